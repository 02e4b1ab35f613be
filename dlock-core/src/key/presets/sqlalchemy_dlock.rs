//! The keys of sqlalchemy-dlock 0.8.1, read from its `lock/postgresql.py` and `lock/mysql.py`:
//! <https://github.com/tanbro/sqlalchemy-dlock>

use blake2::digest::consts::U8;
use blake2::{Blake2b, Digest};

use crate::key::preset;
use crate::key::{Leaf, LockKey, PostgresKey, Preset};

static SQLALCHEMY_DLOCK: Preset = Preset {
    name: "sqlalchemy-dlock",
    postgres: Some(to_postgres),
    mysql: Some(to_mysql),
};

impl LockKey {
    /// The lock that Python's [sqlalchemy-dlock] takes for `key`, so that services in both languages exclude each
    /// other.
    ///
    /// It is not separate from other keys: like that library, it uses integers as they are, and on MySQL and MariaDB
    /// text as it is. It was checked against 0.8.1 and 0.9.0, without a `convert` function, on a little-endian machine:
    /// that library hashes in the machine's byte order.
    ///
    /// [sqlalchemy-dlock]: https://github.com/tanbro/sqlalchemy-dlock
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// let key = LockKey::sqlalchemy_dlock("my-resource-key");
    /// assert_eq!(key.to_string(), r#"sqlalchemy-dlock "my-resource-key""#);
    ///
    /// // create_sadlock(connection, "my-resource-key")
    /// assert_eq!(key.to_postgres()?, PostgresKey::BigInt(-8735762693110921056));
    /// assert_eq!(key.to_mysql()?, "my-resource-key");
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for what that library does not have:
    ///
    /// - everywhere a pair, a namespaced key, another preset, or a preset inside a namespace;
    /// - on MySQL and MariaDB empty text, text of more than 64 characters, bytes that are not UTF-8, a NUL, or a
    ///   character beyond U+FFFF;
    /// - on SQLite every key.
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: empty text is a lock.
    /// - MySQL: `"User"` and `"user"` are the same lock, and so are `"É"` and `"é"`. MySQL 9.7 tells `"é"` from `"e"`.
    /// - A lock manager lets such names wait for each other on MariaDB, which tells them apart.
    /// - MariaDB: text beyond ASCII is the same lock only for connections with the same character set.
    /// - MySQL and MariaDB: `42` and `"42"` are the same lock.
    pub fn sqlalchemy_dlock(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::Preset(&SQLALCHEMY_DLOCK, Box::new(key.into())))
    }
}

fn to_postgres(key: &LockKey) -> Result<PostgresKey, &'static str> {
    let number = match preset::leaf(key)? {
        Leaf::Bytes(bytes) => i64::from_le_bytes(Blake2b::<U8>::digest(bytes).into()),
        Leaf::Integer(number) => *number,
        other => return Err(preset::refusal(other)),
    };
    Ok(PostgresKey::BigInt(number))
}

fn to_mysql(key: &LockKey) -> Result<String, &'static str> {
    match preset::leaf(key)? {
        Leaf::Integer(number) => Ok(number.to_string()),
        other => preset::lock_name(preset::text(other)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresql_keys_are_that_librarys() {
        use PostgresKey::BigInt;

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

    #[test]
    fn what_that_library_lacks_is_no_lock() {
        for key in [
            LockKey::sqlalchemy_dlock((1, 2)),
            LockKey::sqlalchemy_dlock(LockKey::namespaced("a", "b")),
            LockKey::sqlalchemy_dlock(LockKey::sqlalchemy_dlock("a")),
            LockKey::namespaced("a", LockKey::sqlalchemy_dlock("b")),
        ] {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
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
