//! A lock name of MySQL and MariaDB, exactly as a program without any library passes it to `GET_LOCK`.

use crate::key::preset;
use crate::key::{Leaf, LockKey, Preset};

static MYSQL_NAME: Preset = Preset {
    name: "mysql-name",
    postgres: None,
    mysql: Some(to_mysql),
};

impl LockKey {
    /// The lock that `GET_LOCK(name, ..)` takes on MySQL and MariaDB, so that dlock can share it with any program.
    ///
    /// It is not separate from other keys. In particular, a text key that [`to_mysql`](Self::to_mysql) leaves as it is
    /// is the same lock.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::LockKey;
    ///
    /// // SELECT GET_LOCK('Nightly Import', 10)
    /// let key = LockKey::mysql_name("Nightly Import");
    /// assert_eq!(key.to_mysql()?, "Nightly Import");
    /// assert_eq!(key.to_string(), r#"mysql-name "Nightly Import""#);
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The mapping to a server returns [`InvalidKey`](crate::InvalidKey):
    ///
    /// - on MySQL and MariaDB for an empty name, for more than 64 characters, for a NUL and for a character beyond
    ///   U+FFFF;
    /// - on PostgreSQL and SQLite for every name;
    /// - everywhere inside a namespace or another preset.
    ///
    /// # Backend differences
    ///
    /// - MySQL: `"User"` and `"user"` are the same lock, and so are `"É"` and `"é"`. MySQL 9.7 tells `"é"` from `"e"`.
    /// - A lock manager lets such names wait for each other on MariaDB, which tells them apart.
    /// - MariaDB: text beyond ASCII is the same lock only for connections with the same character set.
    pub fn mysql_name(name: impl AsRef<str>) -> LockKey {
        LockKey::plain(Leaf::Preset(&MYSQL_NAME, Box::new(name.as_ref().into())))
    }
}

fn to_mysql(name: &LockKey) -> Result<String, &'static str> {
    preset::lock_name(preset::text(preset::leaf(name)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_stays_as_it_is() {
        let longest = "é".repeat(64);
        for name in ["user/001", "User/001", "dlock:x", "a b ", &longest] {
            assert_eq!(LockKey::mysql_name(name).to_mysql().as_deref(), Ok(name));
        }
    }

    #[test]
    fn what_the_servers_refuse_or_cut_is_no_lock() {
        for name in ["", "a\0b", "🔒", &"é".repeat(65)] {
            assert!(LockKey::mysql_name(name).to_mysql().is_err(), "{name:?}");
        }
    }

    #[test]
    fn it_exists_on_mysql_and_mariadb_only() {
        let key = LockKey::mysql_name("a");
        assert_eq!(
            key.to_postgres().unwrap_err().to_string(),
            r#"lock key mysql-name "a" is a preset without a lock on PostgreSQL: use a key without a preset there"#
        );
        assert!(key.to_sqlite().is_err());
    }
}
