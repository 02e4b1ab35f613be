//! The keys of django-pglock 1.8.0, read from its `pglock/core.py`: <https://github.com/AmbitionEng/django-pglock>

use sha2::{Digest, Sha256};

use crate::key::mapping::EMPTY;
use crate::key::preset;
use crate::key::{Leaf, LockKey, PostgresKey, Preset};

static DJANGO_PGLOCK: Preset = Preset {
    name: "django-pglock",
    postgres: Some(to_postgres),
    mysql: None,
};

impl LockKey {
    /// The lock that Python's [django-pglock] takes for `pglock.advisory(key)`.
    ///
    /// As a decorator without an argument, that library locks the text `module.function` of the decorated function. It
    /// uses integers as they are, so their presets are not separate from plain integers. The values were checked
    /// against version 1.8.0.
    ///
    /// [django-pglock]: https://github.com/AmbitionEng/django-pglock
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// // pglock.advisory("hello")
    /// let key = LockKey::django_pglock("hello");
    /// assert_eq!(key.to_postgres()?, PostgresKey::BigInt(1054880662928880172));
    /// assert_eq!(key.to_string(), r#"django-pglock "hello""#);
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for what that library refuses: empty text, the
    /// number 0, bytes that are not UTF-8, a pair, a namespaced key, another preset, a preset inside a namespace, and
    /// every key on another server than PostgreSQL.
    ///
    /// # Backend differences
    ///
    /// PostgreSQL only.
    pub fn django_pglock(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::Preset(&DJANGO_PGLOCK, Box::new(key.into())))
    }
}

fn to_postgres(key: &LockKey) -> Result<PostgresKey, &'static str> {
    let number = match preset::leaf(key)? {
        Leaf::Integer(0) => {
            return Err(
                "is 0, which that library takes for a missing key: use another number, in every program",
            );
        }
        Leaf::Integer(number) => *number,
        other => match preset::text(other)? {
            "" => return Err(EMPTY),
            text => {
                let digest = Sha256::digest(text);
                let (hash, _) = digest
                    .split_first_chunk()
                    .expect("BUG: SHA-256 has 32 bytes");
                i64::from_le_bytes(*hash)
            }
        },
    };
    Ok(PostgresKey::BigInt(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use PostgresKey::BigInt;

    #[test]
    fn locks_are_that_librarys() {
        for (text, expected) in [
            // Published in the library's tests, as the halves (245608543, 3125670444).
            ("hello", (245608543 << 32) + 3125670444),
            // Returned by version 1.8.0.
            ("café", -8503059731156496507),
            ("漢字", -733359732536388922),
        ] {
            assert_eq!(
                LockKey::django_pglock(text).to_postgres(),
                Ok(BigInt(expected)),
                "{text}"
            );
        }
        assert_eq!(LockKey::django_pglock(-42).to_postgres(), Ok(BigInt(-42)));
    }

    #[test]
    fn what_that_library_refuses_is_no_lock() {
        for key in [
            LockKey::django_pglock(""),
            LockKey::django_pglock(0),
            LockKey::django_pglock((1, 2)),
            LockKey::django_pglock(b"\xff"),
            LockKey::django_pglock(LockKey::namespaced("a", "b")),
            LockKey::django_pglock(LockKey::django_pglock("a")),
            LockKey::namespaced("a", LockKey::django_pglock("b")),
        ] {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
        }
        assert!(LockKey::django_pglock("a").to_mysql().is_err());
        assert!(LockKey::django_pglock("a").to_sqlite().is_err());
    }
}
