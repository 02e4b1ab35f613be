//! The keys of sqlalchemy-dlock 0.8.1, from its `lock/postgresql.py` and `lock/mysql.py`:
//! <https://github.com/tanbro/sqlalchemy-dlock>

use crate::key::{Leaf, LockKey};

impl LockKey {
    /// The lock that Python's [sqlalchemy-dlock] takes for `key`: services in both languages exclude each other.
    ///
    /// It is not separate from other keys: like that library, it uses integers, and on MySQL and MariaDB text, as they
    /// are. Checked against version 0.8.1, without a `convert` function, on a little-endian machine: that library hashes
    /// in the machine's byte order.
    ///
    /// [sqlalchemy-dlock]: https://pypi.org/project/sqlalchemy-dlock/
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// let key = LockKey::sqlalchemy_dlock("my-resource-key");
    /// assert_eq!(key.to_string(), r#"sqlalchemy-dlock "my-resource-key""#);
    ///
    /// # #[cfg(feature = "postgres")] {
    /// // create_sadlock(connection, "my-resource-key")
    /// use dlock_core::PostgresKey;
    /// assert_eq!(key.to_postgres()?, PostgresKey::BigInt(-8735762693110921056));
    /// # }
    /// # #[cfg(feature = "mysql")] {
    /// assert_eq!(key.to_mysql()?, "my-resource-key");
    /// # }
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Mapping the key to a server gives [`InvalidKey`](crate::InvalidKey) where that library has no such lock: for a
    /// pair, a namespaced key or another preset, and for a preset in a namespace. On MySQL and MariaDB also for text that
    /// is empty, longer than 64 characters, not UTF-8, or has a NUL or a character beyond U+FFFF.
    ///
    /// # Backend differences
    ///
    /// PostgreSQL: empty text is a lock too. MySQL: `"User"` and `"user"` are one lock, and so are `"é"` and `"e"`.
    /// MariaDB: text beyond ASCII is one lock only for connections of the same character set. Both: `42` and `"42"` are
    /// one lock.
    pub fn sqlalchemy_dlock(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::SqlalchemyDlock(Box::new(key.into())))
    }
}

/// What that library turns into a lock.
#[cfg(any(feature = "postgres", feature = "mysql"))]
enum Value<'a> {
    Bytes(&'a [u8]),
    Integer(i64),
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
fn value(key: &LockKey) -> Result<Value<'_>, &'static str> {
    if !key.namespaces.is_empty() {
        return Err(
            "has a namespace, which that library lacks: put it into the text, in both programs",
        );
    }
    match &key.leaf {
        Leaf::Bytes(bytes) => Ok(Value::Bytes(bytes)),
        Leaf::Integer(number) => Ok(Value::Integer(*number)),
        Leaf::Pair(..) => {
            Err("is a pair, which that library lacks: use an i64 or text, in both programs")
        }
        Leaf::SqlalchemyDlock(_) => Err("is a preset in a preset: apply it once"),
    }
}

/// The argument of `pg_advisory_lock`, or what is wrong with the key.
#[cfg(feature = "postgres")]
pub(crate) fn to_postgres(key: &LockKey) -> Result<i64, &'static str> {
    use blake2::digest::consts::U8;
    use blake2::{Blake2b, Digest};

    match value(key)? {
        Value::Bytes(bytes) => Ok(i64::from_le_bytes(Blake2b::<U8>::digest(bytes).into())),
        Value::Integer(number) => Ok(number),
    }
}

/// The argument of `GET_LOCK`, or what is wrong with the key.
#[cfg(feature = "mysql")]
pub(crate) fn to_mysql(key: &LockKey) -> Result<String, &'static str> {
    let name = match value(key)? {
        Value::Bytes(bytes) => std::str::from_utf8(bytes).map_err(
            |_| "is not UTF-8, and that library decodes lock names: use text, in both programs",
        )?,
        Value::Integer(number) => return Ok(number.to_string()),
    };
    if name.is_empty() {
        Err(
            "is empty, which nearly always is a missing setting: name what is locked in at least one character",
        )
    } else if name.chars().count() > 64 {
        Err("is longer than 64 characters, the limit of that library: shorten it, in both programs")
    } else if name.contains('\0') {
        Err("contains NUL, where the servers cut lock names: take it out, in both programs")
    } else if name.chars().any(|character| character > '\u{ffff}') {
        Err(
            "contains a character beyond U+FFFF, which MySQL refuses: take it out, in both programs",
        )
    } else {
        Ok(name.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "postgres")]
    #[test]
    fn postgresql_keys_are_that_librarys() {
        use crate::PostgresKey::BigInt;

        // What the code of sqlalchemy-dlock 0.8.1 gives.
        for (text, expected) in [
            ("my-resource-key", -8735762693110921056),
            ("a", 3405396810240292928),
            ("", -5426141060434712860),
            ("café", -2028992364774525097),
        ] {
            assert_eq!(
                LockKey::sqlalchemy_dlock(text).to_postgres(),
                Ok(BigInt(expected)),
                "{text}"
            );
        }
        assert_eq!(LockKey::sqlalchemy_dlock(42).to_postgres(), Ok(BigInt(42)));
        assert!(LockKey::sqlalchemy_dlock(b"\xff").to_postgres().is_ok());
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn mysql_keys_are_that_librarys() {
        let longest = "é".repeat(64);
        for text in ["My-Resource-Key", "café", "dlock:x", &longest] {
            assert_eq!(
                LockKey::sqlalchemy_dlock(text).to_mysql().as_deref(),
                Ok(text)
            );
        }
        assert_eq!(
            LockKey::sqlalchemy_dlock(-42).to_mysql().as_deref(),
            Ok("-42")
        );
    }

    #[cfg(feature = "mysql")]
    #[test]
    fn what_mysql_or_that_library_refuses_is_no_lock() {
        for text in ["", "a\0b", "🔒", &"é".repeat(65)] {
            assert!(
                LockKey::sqlalchemy_dlock(text).to_mysql().is_err(),
                "{text:?}"
            );
        }
        assert!(LockKey::sqlalchemy_dlock(b"\xff").to_mysql().is_err());
    }

    #[cfg(any(feature = "postgres", feature = "mysql"))]
    #[test]
    fn what_that_library_lacks_is_no_lock() {
        for key in [
            LockKey::sqlalchemy_dlock((1, 2)),
            LockKey::sqlalchemy_dlock(LockKey::namespaced("a", "b")),
            LockKey::sqlalchemy_dlock(LockKey::sqlalchemy_dlock("a")),
            LockKey::namespaced("a", LockKey::sqlalchemy_dlock("b")),
        ] {
            #[cfg(feature = "postgres")]
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
            #[cfg(feature = "mysql")]
            assert_eq!(key.to_mysql().unwrap_err().key(), &key);
        }
    }

    #[test]
    fn a_preset_is_another_key_than_what_it_wraps() {
        let preset = LockKey::sqlalchemy_dlock("a");
        assert_ne!(preset, LockKey::from("a"));
        assert_eq!(preset.to_string(), r#"sqlalchemy-dlock "a""#);
    }
}
