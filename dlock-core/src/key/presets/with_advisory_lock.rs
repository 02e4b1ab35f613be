//! The keys of with_advisory_lock 7.5.0, read from its `lib/with_advisory_lock/core_advisory.rb`,
//! `postgresql_advisory.rb` and `mysql_advisory.rb`: <https://github.com/ClosureTree/with_advisory_lock>

use crate::key::preset;
use crate::key::{Leaf, LockKey, PostgresKey, Preset};

static WITH_ADVISORY_LOCK: Preset = Preset {
    name: "with_advisory_lock",
    postgres: Some(to_postgres),
    mysql: Some(to_mysql),
};

/// That library keeps 31 of 32 bits, so that PostgreSQL accepts the number as an `integer`.
const BITS: u32 = 0x7fff_ffff;

impl LockKey {
    /// The lock that Ruby's [with_advisory_lock] takes for `key` when `WITH_ADVISORY_LOCK_PREFIX` is not set.
    ///
    /// It is not separate from other keys, and on PostgreSQL its own keys collide: that library hashes text to 31 bits,
    /// so of 10,000 keys two are the same lock with a probability of 1 in 43. The values were checked against version
    /// 7.5.0.
    ///
    /// [with_advisory_lock]: https://github.com/ClosureTree/with_advisory_lock
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// // ActiveRecord::Base.with_advisory_lock("nightly") { .. }
    /// let key = LockKey::with_advisory_lock("nightly");
    /// assert_eq!(key.to_postgres()?, PostgresKey::Pair(267906906, 0));
    /// assert_eq!(key.to_mysql()?, "nightly");
    /// assert_eq!(key.to_string(), r#"with_advisory_lock "nightly""#);
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for what that library does not have:
    ///
    /// - everywhere a pair, bytes that are not UTF-8, a namespaced key, another preset, or a preset inside a namespace;
    /// - on MySQL and MariaDB empty text, text of more than 64 characters, a NUL, or a character beyond U+FFFF;
    /// - on SQLite every key.
    ///
    /// # Backend differences
    ///
    /// - PostgreSQL: empty text is a lock. Of a number, that library uses the lowest 31 bits. If
    ///   `WITH_ADVISORY_LOCK_PREFIX` is set, replace the pair's 0 with the prefix as Ruby's `to_i` reads it, which is 0
    ///   for text such as `app`.
    /// - MySQL and MariaDB: `42` and `"42"` are the same lock. If `WITH_ADVISORY_LOCK_PREFIX` is set, put it in front
    ///   of the text.
    /// - MySQL: `"User"` and `"user"` are the same lock, and so are `"É"` and `"é"`. MySQL 9.7 tells `"é"` from `"e"`.
    /// - A lock manager lets such names wait for each other on MariaDB, which tells them apart.
    /// - MariaDB: text beyond ASCII is the same lock only for connections with the same character set.
    pub fn with_advisory_lock(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::Preset(&WITH_ADVISORY_LOCK, Box::new(key.into())))
    }
}

fn to_postgres(key: &LockKey) -> Result<PostgresKey, &'static str> {
    let number = match preset::leaf(key)? {
        Leaf::Integer(number) => *number as u32,
        other => crc32fast::hash(preset::text(other)?.as_bytes()),
    };
    Ok(PostgresKey::Pair((number & BITS) as i32, 0))
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
    use PostgresKey::Pair;

    #[test]
    fn postgresql_keys_are_that_librarys() {
        // Returned by version 7.5.0.
        for (key, expected) in [
            (LockKey::from("a"), 1756872259),
            ("".into(), 0),
            ("café".into(), 414007989),
            ("漢字".into(), 425835439),
            (42.into(), 42),
            ((-42).into(), 2147483606),
            (4294967297i64.into(), 1),
            (i64::MAX.into(), 2147483647),
            (i64::MIN.into(), 0),
        ] {
            let key = LockKey::with_advisory_lock(key);
            assert_eq!(key.to_postgres(), Ok(Pair(expected, 0)), "{key}");
        }
    }

    #[test]
    fn mysql_keys_are_that_librarys() {
        for text in ["User/001", "café", "dlock:x"] {
            assert_eq!(
                LockKey::with_advisory_lock(text).to_mysql().as_deref(),
                Ok(text)
            );
        }
        assert_eq!(
            LockKey::with_advisory_lock(-42).to_mysql().as_deref(),
            Ok("-42")
        );
    }

    #[test]
    fn what_that_library_lacks_is_no_lock() {
        for key in [
            LockKey::with_advisory_lock((1, 2)),
            LockKey::with_advisory_lock(b"\xff"),
            LockKey::with_advisory_lock(LockKey::namespaced("a", "b")),
            LockKey::with_advisory_lock(LockKey::with_advisory_lock("a")),
            LockKey::namespaced("a", LockKey::with_advisory_lock("b")),
        ] {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
            assert_eq!(key.to_mysql().unwrap_err().key(), &key);
            assert!(key.to_sqlite().is_err());
        }
        assert!(LockKey::with_advisory_lock("").to_mysql().is_err());
    }
}
