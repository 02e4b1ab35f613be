//! The keys of sqlx 0.8.6, read from its `sqlx-postgres/src/advisory_lock.rs`, `sqlx-postgres/src/migrate.rs` and
//! `sqlx-mysql/src/migrate.rs`: <https://github.com/launchbadge/sqlx>

use hkdf::Hkdf;
use sha2::Sha256;

use crate::key::preset;
use crate::key::{Leaf, LockKey, PostgresKey, Preset};

static SQLX: Preset = Preset {
    name: "sqlx",
    postgres: Some(to_postgres),
    mysql: None,
};

static SQLX_MIGRATOR: Preset = Preset {
    name: "sqlx-migrator",
    postgres: Some(|database| migration_lock(database).map(PostgresKey::BigInt)),
    mysql: Some(|database| migration_lock(database).map(|number| format!("{number:x}"))),
};

/// What ties the hash to sqlx.
const INFO: &[u8] = b"SQLx (Rust) Postgres advisory lock";

/// sqlx's own factor, which keeps its migrations apart from other users of the same hash.
const MIGRATOR: i64 = 0x3d32_ad9e;

impl LockKey {
    /// The lock that sqlx's [`PgAdvisoryLock`] takes for `key`, so that programs with sqlx and with Diesel exclude each
    /// other.
    ///
    /// Text is the argument of `PgAdvisoryLock::new`. A number or a pair is that of `PgAdvisoryLock::with_key`, which
    /// uses them as they are. The values were checked against sqlx 0.8.6.
    ///
    /// [`PgAdvisoryLock`]: https://docs.rs/sqlx/0.8/sqlx/postgres/struct.PgAdvisoryLock.html
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// // PgAdvisoryLock::new("my first Postgres advisory lock!")
    /// let key = LockKey::sqlx("my first Postgres advisory lock!");
    /// assert_eq!(key.to_postgres()?, PostgresKey::BigInt(-5560419505042474287));
    /// assert_eq!(key.to_string(), r#"sqlx "my first Postgres advisory lock!""#);
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for what sqlx does not have: bytes that are
    /// not UTF-8, a namespaced key, another preset, a preset inside a namespace, and every key on another server than
    /// PostgreSQL.
    ///
    /// # Backend differences
    ///
    /// PostgreSQL only. Empty text is a lock.
    pub fn sqlx(key: impl Into<LockKey>) -> LockKey {
        LockKey::plain(Leaf::Preset(&SQLX, Box::new(key.into())))
    }

    /// The lock that sqlx's [`Migrator`] takes while it migrates the database called `database`.
    ///
    /// `database` is what `current_database()` returns on PostgreSQL and `DATABASE()` on MySQL and MariaDB, in the same
    /// case. The values were checked against sqlx 0.8.6, with its default of `set_locking(true)`.
    ///
    /// [`Migrator`]: https://docs.rs/sqlx/0.8/sqlx/migrate/struct.Migrator.html
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{LockKey, PostgresKey};
    ///
    /// let key = LockKey::sqlx_migrator("shop");
    /// assert_eq!(key.to_postgres()?, PostgresKey::BigInt(2969972169318647292));
    /// assert_eq!(key.to_mysql()?, "293775f3d108c5fc");
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey) for an empty name, inside a namespace or
    /// another preset, and on SQLite, where sqlx migrates without a lock.
    ///
    /// # Backend differences
    ///
    /// MariaDB: sqlx 0.8.6 asks for the lock with a limit of -1, which MariaDB 11.8 refuses, and then migrates without
    /// it. dlock takes the lock, but sqlx does not wait for it.
    pub fn sqlx_migrator(database: impl AsRef<str>) -> LockKey {
        LockKey::plain(Leaf::Preset(
            &SQLX_MIGRATOR,
            Box::new(database.as_ref().into()),
        ))
    }
}

fn to_postgres(key: &LockKey) -> Result<PostgresKey, &'static str> {
    match preset::leaf(key)? {
        Leaf::Integer(number) => Ok(PostgresKey::BigInt(*number)),
        Leaf::Pair(first, second) => Ok(PostgresKey::Pair(*first, *second)),
        other => {
            let mut hash = [0; 8];
            Hkdf::<Sha256>::new(None, preset::text(other)?.as_bytes())
                .expand(INFO, &mut hash)
                .expect("BUG: HKDF-SHA256 gives up to 8,160 bytes");
            Ok(PostgresKey::BigInt(i64::from_le_bytes(hash)))
        }
    }
}

fn migration_lock(database: &LockKey) -> Result<i64, &'static str> {
    match preset::text(preset::leaf(database)?)? {
        "" => Err(
            "is empty, but every database has a name: pass the name of the database that is migrated",
        ),
        name => Ok(MIGRATOR * i64::from(crc32fast::hash(name.as_bytes()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PostgresKey::{BigInt, Pair};

    #[test]
    fn locks_are_those_of_pg_advisory_lock() {
        // Published in the library's documentation.
        let key = LockKey::sqlx("my first Postgres advisory lock!");
        assert_eq!(key.to_postgres(), Ok(BigInt(-5560419505042474287)));
        // Returned by version 0.8.6.
        for (text, expected) in [("", 8559922135585776354), ("café", -1056835438365672010)] {
            assert_eq!(
                LockKey::sqlx(text).to_postgres(),
                Ok(BigInt(expected)),
                "{text}"
            );
        }
        assert_eq!(LockKey::sqlx(-42).to_postgres(), Ok(BigInt(-42)));
        assert_eq!(LockKey::sqlx((1, -2)).to_postgres(), Ok(Pair(1, -2)));
    }

    #[test]
    fn what_pg_advisory_lock_lacks_is_no_lock() {
        for key in [
            LockKey::sqlx(b"\xff"),
            LockKey::sqlx(LockKey::namespaced("a", "b")),
            LockKey::sqlx(LockKey::sqlx("a")),
            LockKey::namespaced("a", LockKey::sqlx("b")),
        ] {
            assert_eq!(key.to_postgres().unwrap_err().key(), &key);
        }
        assert!(LockKey::sqlx("a").to_mysql().is_err());
        assert!(LockKey::sqlx("a").to_sqlite().is_err());
    }

    #[test]
    fn migrations_lock_what_the_migrator_locks() {
        // What version 0.8.6 held on PostgreSQL 17 and MySQL 9.7, in a database called `test`.
        let key = LockKey::sqlx_migrator("test");
        assert_eq!(key.to_postgres(), Ok(BigInt(3729328775749822312)));
        assert_eq!(key.to_mysql().as_deref(), Ok("33c13cc34135e768"));
    }

    #[test]
    fn a_database_that_is_migrated_has_a_name() {
        assert!(LockKey::sqlx_migrator("").to_postgres().is_err());
        assert!(LockKey::sqlx_migrator("").to_mysql().is_err());
        assert!(LockKey::sqlx_migrator("a").to_sqlite().is_err());
    }
}
