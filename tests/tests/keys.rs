//! The mapping from keys to locks is frozen: the code, the vectors, the page and the Python implementation agree.

use dlock_core::{InvalidKey, LockKey, PostgresKey};
use serde::Deserialize;
use siphasher::{sip, sip128};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    note: String,
    text: Option<String>,
    key: Key,
    postgres: Postgres,
    mysql: Mysql,
    sqlite: Sqlite,
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Key {
    Bytes {
        bytes: String,
    },
    Integer {
        i64: String,
    },
    Pair {
        pair: (i32, i32),
    },
    Namespaced {
        namespace: String,
        key: Box<Key>,
    },
    /// A slot of a semaphore, or without a number its gate.
    Semaphore {
        semaphore: Box<Key>,
        slot: Option<u32>,
    },
    Preset(Preset),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Preset {
    DistributedLock(Box<Key>),
    DjangoPglock(Box<Key>),
    MysqlName(Box<Key>),
    SqlalchemyDlock(Box<Key>),
    Sqlx(Box<Key>),
    SqlxMigrator(Box<Key>),
    WithAdvisoryLock(Box<Key>),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
enum Postgres {
    Bigint(String),
    Pair(i32, i32),
    Error(bool),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
enum Mysql {
    Name(String),
    Error(bool),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
enum Sqlite {
    Number(String),
    Error(bool),
}

impl Key {
    fn lock_key(&self) -> LockKey {
        match self {
            Key::Bytes { bytes } => unhex(bytes).into(),
            Key::Integer { i64 } => i64.parse::<i64>().unwrap().into(),
            Key::Pair { pair } => (*pair).into(),
            Key::Namespaced { namespace, key } => LockKey::namespaced(namespace, key.lock_key()),
            Key::Semaphore { semaphore, slot } => semaphore.lock_key().semaphore_lock(*slot),
            Key::Preset(preset) => preset.lock_key(),
        }
    }

    /// The text of a key that is text.
    fn text(&self) -> String {
        let Key::Bytes { bytes } = self else {
            panic!("{} is not text", self.lock_key())
        };
        String::from_utf8(unhex(bytes)).unwrap()
    }

    /// Whether another library chose the lock. Such locks may be the same as those of other keys.
    fn is_preset(&self) -> bool {
        matches!(self, Key::Preset(_))
    }
}

impl Preset {
    fn lock_key(&self) -> LockKey {
        match self {
            Preset::DistributedLock(key) => LockKey::distributed_lock(key.lock_key()),
            Preset::DjangoPglock(key) => LockKey::django_pglock(key.lock_key()),
            Preset::MysqlName(key) => LockKey::mysql_name(key.text()),
            Preset::SqlalchemyDlock(key) => LockKey::sqlalchemy_dlock(key.lock_key()),
            Preset::Sqlx(key) => LockKey::sqlx(key.lock_key()),
            Preset::SqlxMigrator(key) => LockKey::sqlx_migrator(key.text()),
            Preset::WithAdvisoryLock(key) => LockKey::with_advisory_lock(key.lock_key()),
        }
    }
}

impl From<Result<PostgresKey, InvalidKey>> for Postgres {
    fn from(key: Result<PostgresKey, InvalidKey>) -> Self {
        match key {
            Ok(PostgresKey::BigInt(number)) => Postgres::Bigint(number.to_string()),
            Ok(PostgresKey::Pair(first, second)) => Postgres::Pair(first, second),
            Err(_) => Postgres::Error(true),
        }
    }
}

impl From<Result<String, InvalidKey>> for Mysql {
    fn from(name: Result<String, InvalidKey>) -> Self {
        name.map_or(Mysql::Error(true), Mysql::Name)
    }
}

impl From<Result<u64, InvalidKey>> for Sqlite {
    fn from(number: Result<u64, InvalidKey>) -> Self {
        number.map_or(Sqlite::Error(true), |number| {
            Sqlite::Number(number.to_string())
        })
    }
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

fn rows() -> Vec<Row> {
    let json = std::fs::read_to_string(docs().join("key-vectors.json")).unwrap();
    serde_json::from_str(&json).unwrap()
}

fn unhex(digits: &str) -> Vec<u8> {
    assert!(digits.len() % 2 == 0 && digits.is_ascii(), "{digits}");
    (0..digits.len())
        .step_by(2)
        .map(|start| u8::from_str_radix(&digits[start..start + 2], 16).unwrap())
        .collect()
}

#[test]
fn every_vector_agrees_with_the_code() {
    let rows = rows();
    assert!(rows.len() >= 270, "only {} rows", rows.len());
    for row in rows {
        let key = row.key.lock_key();
        assert_eq!(
            Postgres::from(key.to_postgres()),
            row.postgres,
            "{}: {key}",
            row.note
        );
        assert_eq!(
            Mysql::from(key.to_mysql()),
            row.mysql,
            "{}: {key}",
            row.note
        );
        assert_eq!(
            Sqlite::from(key.to_sqlite()),
            row.sqlite,
            "{}: {key}",
            row.note
        );
        if let Some(text) = row.text {
            assert_eq!(LockKey::from(text), key, "{}", row.note);
        }
    }
}

#[test]
fn distinct_keys_are_distinct_locks_on_every_server() {
    let mut keys = HashMap::new();
    let mut postgres = HashMap::new();
    let mut mysql = HashMap::new();
    let mut sqlite = HashMap::new();
    for row in rows() {
        let note = row.note;
        if let Some(other) = keys.insert(row.key.lock_key(), note.clone()) {
            panic!("{note} and {other} are one key");
        }
        if row.key.is_preset() {
            continue;
        }
        if row.postgres != Postgres::Error(true) {
            if let Some(other) = postgres.insert(row.postgres, note.clone()) {
                panic!("{note} and {other} are one lock on PostgreSQL");
            }
        }
        if row.mysql != Mysql::Error(true) {
            if let Some(other) = mysql.insert(row.mysql, note.clone()) {
                panic!("{note} and {other} are one lock on MySQL");
            }
        }
        if row.sqlite != Sqlite::Error(true) {
            if let Some(other) = sqlite.insert(row.sqlite, note.clone()) {
                panic!("{note} and {other} are one lock on SQLite");
            }
        }
    }
}

#[test]
fn lock_names_are_what_mysql_does_not_fold_or_cut() {
    for row in rows().into_iter().filter(|row| !row.key.is_preset()) {
        if let Mysql::Name(name) = row.mysql {
            assert!((1..=64).contains(&name.len()), "{name}");
            assert!(
                name.bytes()
                    .all(|byte| matches!(byte, b' '..=b'~') && !byte.is_ascii_uppercase()),
                "{name}"
            );
        }
    }
}

#[test]
fn an_error_names_the_key_the_problem_and_a_remedy() {
    for row in rows() {
        let key = row.key.lock_key();
        let errors = [
            key.to_postgres().err(),
            key.to_mysql().err(),
            key.to_sqlite().err(),
        ];
        for error in errors.into_iter().flatten() {
            let message = error.to_string();
            assert!(
                message.starts_with(&format!("lock key {key} ")),
                "{message}"
            );
            assert!(
                message.contains(": ") && !message.ends_with('.'),
                "{message}"
            );
        }
    }
}

/// The cells of the rows of a Markdown table, without their backticks.
fn table<'page>(page: &'page str, heading: &str) -> Vec<Vec<&'page str>> {
    let heading = format!("| {heading} |");
    page.lines()
        .skip_while(|line| !line.starts_with(&heading))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().trim_matches('`'))
                .collect()
        })
        .collect()
}

#[test]
fn the_page_can_be_followed_to_the_same_locks() {
    let page = std::fs::read_to_string(docs().join("keys.md")).unwrap();

    let hash_keys: HashMap<&str, [u8; 16]> = table(&page, "name | hash key")
        .into_iter()
        .map(|cells| {
            assert_eq!(unhex(cells[2]), cells[1].as_bytes());
            (cells[0], cells[1].as_bytes().try_into().unwrap())
        })
        .collect();
    assert_eq!(hash_keys["TEXT"], *b"dlock text/bytes");
    assert_eq!(hash_keys["STRUCTURED"], *b"dlock structured");

    let vectors: HashMap<String, Row> = rows()
        .into_iter()
        .map(|row| (row.key.lock_key().to_string(), row))
        .collect();
    let examples = table(&page, "key | hash key | message");
    assert!(examples.len() >= 12, "only {} examples", examples.len());
    for cells in examples {
        let [key, hash_key, message, postgres, mysql, sqlite] = cells[..] else {
            panic!("{cells:?}");
        };
        let row = &vectors[key];

        let hash_key = &hash_keys[hash_key];
        let message = unhex(message);
        let hash = sip::SipHasher24::new_with_key(hash_key).hash(&message) as i64;
        match (&row.key, &row.postgres) {
            (Key::Integer { i64 }, _) => assert_eq!(postgres, i64),
            (Key::Pair { pair }, _) => assert_eq!(postgres, format!("{pair:?}")),
            (_, expected) => {
                assert_eq!(postgres, hash.to_string(), "{key}");
                assert_eq!(*expected, Postgres::Bigint(postgres.to_owned()), "{key}");
            }
        }

        match &row.key {
            Key::Integer { i64 } => assert_eq!(sqlite, i64),
            _ => assert_eq!(
                sqlite.parse(),
                Ok((1 << 60) + (hash as u64) % (1 << 60)),
                "{key}"
            ),
        }
        assert_eq!(row.sqlite, Sqlite::Number(sqlite.to_owned()), "{key}");

        assert_eq!(row.mysql, Mysql::Name(mysql.to_owned()), "{key}");
        if mysql.starts_with("dlock:") {
            let hash = sip128::SipHasher24::new_with_key(hash_key).hash(&message);
            let digits: String = hash
                .as_bytes()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(mysql.rsplit(':').next(), Some(&*digits), "{key}");
        } else {
            assert_eq!(mysql.as_bytes(), message, "{key}");
        }
    }
}

#[test]
fn the_page_can_be_followed_to_the_same_semaphore() {
    let page = std::fs::read_to_string(docs().join("keys.md")).unwrap();
    let examples = table(&page, "lock of the semaphore `\"gpu\"` | message");
    assert_eq!(examples.len(), 2);
    for (cells, slot) in examples.iter().zip([None, Some(0)]) {
        let [_, message, postgres, mysql, sqlite] = cells[..] else {
            panic!("{cells:?}");
        };
        let key = LockKey::from("gpu").semaphore_lock(slot);
        let message = unhex(message);
        let hash = sip::SipHasher24::new_with_key(b"dlock structured").hash(&message);
        let number = hash / 1024 * 1024 + slot.map_or(0, |slot| 1 + u64::from(slot));
        assert_eq!(postgres, (number as i64).to_string());
        assert_eq!(
            Postgres::from(key.to_postgres()),
            Postgres::Bigint(postgres.into())
        );
        assert_eq!(sqlite, ((1 << 60) + number % (1 << 60)).to_string());
        assert_eq!(Sqlite::from(key.to_sqlite()), Sqlite::Number(sqlite.into()));
        assert_eq!(Mysql::from(key.to_mysql()), Mysql::Name(mysql.into()));
        let hash = sip128::SipHasher24::new_with_key(b"dlock structured").hash(&message);
        let digits: String = hash.as_bytes()[..12]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(mysql.split(':').nth(2), Some(&*digits));
    }
}

/// What `keys.py` prints.
fn keys_py(arguments: &[&str]) -> String {
    let output = Command::new("python3")
        .arg(docs().join("keys.py"))
        .args(arguments)
        .output()
        .expect("this test runs python3: install it, e.g. with `apt install python3`");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_python_implementation_agrees() {
    assert_eq!(keys_py(&[]).trim(), format!("{} rows agree", rows().len()));
}

#[test]
fn the_python_implementation_explains_a_key() {
    for (argument, key) in [
        ("user/001", LockKey::from("user/001")),
        ("42", LockKey::from(42)),
        (r#""42""#, LockKey::from("42")),
        ("[1, -2]", LockKey::from((1, -2))),
        (r#"{"bytes": "636166c3a9"}"#, LockKey::from("café")),
        (
            r#"{"namespace": "billing", "key": {"pair": [1, -2]}}"#,
            LockKey::namespaced("billing", (1, -2)),
        ),
        (
            r#"{"distributed_lock": "ABC"}"#,
            LockKey::distributed_lock("ABC"),
        ),
        (
            r#"{"semaphore": "gpu", "slot": 3}"#,
            LockKey::from("gpu").semaphore_lock(Some(3)),
        ),
        (
            r#"{"semaphore": 42, "slot": null}"#,
            LockKey::from(42).semaphore_lock(None),
        ),
        (
            r#"{"with_advisory_lock": 7}"#,
            LockKey::with_advisory_lock(7),
        ),
    ] {
        let postgres = match key.to_postgres().unwrap() {
            PostgresKey::BigInt(number) => format!("bigint {number}"),
            PostgresKey::Pair(first, second) => format!("pair ({first}, {second})"),
        };
        let sqlite = key.to_sqlite().map_or_else(
            |_| "no lock, because no preset has locks for SQLite".to_owned(),
            |number| format!("number {number}"),
        );
        let expected = format!(
            "key: {key}\nPostgreSQL: {postgres}\nMySQL, MariaDB: name {}\nSQLite: {sqlite}\n",
            key.to_mysql().unwrap()
        );
        assert_eq!(keys_py(&[argument]), expected);
    }
}
