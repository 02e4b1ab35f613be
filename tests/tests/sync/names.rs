//! Which keys are one lock, and which are not.

use std::collections::HashMap;

use diesel::{MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, LockKey};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server, on_every_server, on_mysql, on_postgres,
    unique_key,
};

use crate::support::*;

/// Keys that some server, or some library, takes for each other.
fn awkward_keys(unique: &str) -> Vec<LockKey> {
    let texts = [
        "user",
        "User",
        "USER",
        "user ",
        " user",
        "user  ",
        "user\t",
        "user\0",
        "user\0a",
        "user\0b",
        "us%r",
        "us_r",
        "us'r",
        "us\"r",
        "us\\r",
        "us?r",
        "us$1r",
        "caf\u{e9}",
        "cafe\u{301}",
        "cafe",
        "CAF\u{c9}",
        "stra\u{df}e",
        "strasse",
        "\u{130}",
        "i\u{307}",
        "\u{fb01}",
        "fi",
        "\u{ff21}",
        "\u{1f512}",
        "\u{1f511}",
        "\u{200b}user",
        "dlock:",
        "dlock:user",
        "DLOCK:user",
        "42",
        "042",
        "42.0",
        "(1, 2)",
        "1/2",
        "a/b",
        "a:b",
    ];
    let prefixed = texts.map(|text| LockKey::from(format!("{unique}{text}")));
    // Where the text has to stand at the beginning, the unique part comes last.
    let suffixed = texts.map(|text| LockKey::from(format!("{text}{unique}")));
    let pad = |length: usize| format!("{unique}{}", "x".repeat(length - unique.len()));
    let bytes = |bytes: &[u8]| LockKey::from([unique.as_bytes(), bytes].concat());
    let number = unique.bytes().fold(7, |hash: i64, byte| {
        hash.wrapping_mul(131).wrapping_add(byte.into())
    });
    let (high, low) = ((number >> 32) as i32, number as i32);
    let others = [
        pad(64).into(),
        pad(65).into(),
        pad(66).into(),
        pad(1_000).into(),
        bytes(b"\xff"),
        bytes(b"\xfe"),
        bytes(b"\xc3"),
        bytes("\u{fffd}".as_bytes()),
        bytes(b"\xe9"),
        number.into(),
        number.wrapping_add(1).into(),
        number.to_string().into(),
        (high, low).into(),
        (low, high).into(),
        format!("({high}, {low})").into(),
        LockKey::namespaced(unique, "a"),
        LockKey::namespaced(unique, "A"),
        LockKey::namespaced(unique, 1),
        LockKey::namespaced(unique, "1"),
        LockKey::namespaced(unique, (0, 1)),
        LockKey::namespaced(unique, LockKey::namespaced("a", "b")),
        LockKey::namespaced(unique, LockKey::namespaced("b", "a")),
        LockKey::namespaced(unique, "a/c"),
        LockKey::namespaced(format!("{unique}/a"), "c"),
        LockKey::namespaced(format!("{unique}a"), "b"),
        LockKey::namespaced(unique, "ab"),
        LockKey::namespaced("a", unique),
    ];
    prefixed.into_iter().chain(suffixed).chain(others).collect()
}

/// The character sets that clients of a server use, in the SQL that sets them.
fn character_sets(server: &Server) -> Vec<&'static str> {
    match server.kind {
        Kind::Postgres => vec![
            "SET client_encoding = 'UTF8'",
            "SET client_encoding = 'LATIN1'",
            "SET client_encoding = 'SJIS'",
            "SET client_encoding = 'GB18030'",
        ],
        Kind::Mysql => vec![
            "SET NAMES utf8mb4",
            "SET NAMES latin1",
            "SET NAMES sjis",
            "SET NAMES swe7",
            "SET NAMES gbk",
            "SET NAMES binary",
        ],
        Kind::Sqlite => panic!("SQLite's clients all speak UTF-8"),
    }
}

on_every_server! {
    fn distinct_keys_are_distinct_locks<C: LockTest>(server: &Server) {
        let keys = awkward_keys(&unique_key("n"));
        let (mut holder, mut other, mut observer) = (C::open(server), C::open(server), C::open(server));
        let (holder_id, other_id) = (holder.backend_id(), other.backend_id());
        // One connection has the first half and the other the second, one at a time, so that all stand side by side.
        for (index, key) in keys.iter().enumerate() {
            let conn = if index % 2 == 0 { &mut holder } else { &mut other };
            let lock = conn.advisory_lock(key).try_acquire().expect("a try");
            let lock = lock.unwrap_or_else(|| panic!("{key} is the lock of another key"));
            if C::KIND == Kind::Sqlite {
                // There, a hold has the number of its guard.
                drop(lock);
                hold_by_hand(conn, key);
            } else {
                // Held to the end of the session.
                std::mem::forget(lock);
            }
        }
        for (index, key) in keys.iter().enumerate() {
            let id = if index % 2 == 0 { holder_id } else { other_id };
            assert_held_by(&mut observer, key, id);
        }
        // Two keys of one session would pass until here: it counts its holds. To release one frees that one alone.
        let mut expected: HashMap<&LockKey, i64> = keys
            .iter()
            .enumerate()
            .map(|(index, key)| (key, if index % 2 == 0 { holder_id } else { other_id }))
            .collect();
        assert_eq!(expected.len(), keys.len(), "a key stands twice in the list");
        for (index, key) in keys.iter().enumerate() {
            let conn = if index % 2 == 0 { &mut holder } else { &mut other };
            // The second hold is given back with the guard, the first one by hand.
            conn.advisory_lock(key).acquire().expect("its own lock").release().expect("a release");
            release_by_hand(conn, key);
            expected.remove(key);
            assert_free(&mut observer, key);
            if index % 10 == 0 {
                for (key, id) in &expected {
                    assert_eq!(holders(&mut observer, *key), [*id], "{key}");
                }
            }
        }
    }
}

on_every_network_server! {
    fn a_key_is_one_lock_whatever_the_clients_character_set<C: LockTest>(server: &Server) {
        let keys = awkward_keys(&unique_key("c"));
        let mut observer = C::open(server);
        let mut conns = character_sets(server).into_iter().map(|character_set| {
            let mut conn = C::open(server);
            conn.execute_sql(character_set);
            (character_set, conn)
        }).collect::<Vec<_>>();
        for (index, key) in keys.iter().enumerate() {
            // Each of them is the holder in turn.
            let count = conns.len();
            conns.rotate_left(index % count);
            let ((_, holder), others) = conns.split_first_mut().expect("some");
            let id = holder.backend_id();
            let lock = holder.advisory_lock(key).try_acquire().expect("a try").expect("a free lock");
            assert_held_by(&mut observer, key, id);
            for (character_set, other) in others {
                let taken = other.advisory_lock(key).try_acquire().expect("a try").is_none();
                assert!(taken, "{key} is another lock after {character_set}");
                let holders = other.advisory_lock(key).holders().expect("holders");
                assert_eq!(holders.first().map(|holder| holder.backend_id), Some(id), "{key} after {character_set}");
            }
            lock.release().expect("a release");
            assert_free(&mut observer, key);
        }
    }
}

/// Takes a lock on SQLite, with a number of its own.
fn hold_by_hand<C: LockTest>(conn: &mut C, key: &LockKey) {
    let key = key.to_sqlite().expect("a valid key");
    let held = conn.number(&format!("SELECT dlock_acquire({key}, 1, 0, -1 - {key})"));
    assert_eq!(held, Some(1), "{key}");
}

/// Releases one hold that has no guard.
fn release_by_hand<C: LockTest>(conn: &mut C, key: &LockKey) {
    let released = match C::KIND {
        Kind::Postgres => {
            let key = match key.to_postgres().expect("a valid key") {
                dlock_core::PostgresKey::BigInt(key) => format!("'{key}'::bigint"),
                dlock_core::PostgresKey::Pair(first, second) => {
                    format!("'{first}'::int, '{second}'::int")
                }
            };
            conn.number(&format!("SELECT pg_advisory_unlock({key})"))
        }
        Kind::Mysql => {
            let name = key.to_mysql().expect("a valid key");
            let name = name.replace('\\', "\\\\").replace('\'', "''");
            conn.number(&format!("SELECT RELEASE_LOCK('{name}')"))
        }
        Kind::Sqlite => {
            let key = key.to_sqlite().expect("a valid key");
            conn.number(&format!("SELECT dlock_release({key}, -1 - {key})"))
        }
    };
    assert_eq!(released, Some(1), "{key}");
}

on_mysql! {
    fn a_plain_name_is_the_servers_own(server: &Server) {
        let [mut holder, mut other] = [(); 2].map(|()| MysqlConnection::open(server));
        let id = holder.backend_id();
        let plain = unique_key("plain name!");
        let longest = format!("{:x<64}", unique_key("longest"));
        for name in [plain, longest] {
            let lock = holder.advisory_lock(&name).acquire().expect("a free lock");
            assert_eq!(other.number(&format!("SELECT CAST(IS_USED_LOCK('{name}') AS SIGNED)")), Some(id));
            assert_eq!(other.number(&format!("SELECT GET_LOCK('{name}', 0)")), Some(0));
            lock.release().expect("a release");
            // And the other way round.
            assert_eq!(other.number(&format!("SELECT GET_LOCK('{name}', 0)")), Some(1));
            assert!(holder.advisory_lock(&name).try_acquire().expect("a try").is_none());
            assert_eq!(other.number(&format!("SELECT RELEASE_LOCK('{name}')")), Some(1));
        }
    }

    fn every_database_of_the_server_has_the_same_locks(server: &Server) {
        let key = unique_key("databases");
        let [mut holder, mut other] = [(); 2].map(|()| MysqlConnection::open(server));
        other.execute_sql("USE information_schema");
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        assert!(other.advisory_lock(&key).try_acquire().expect("a try").is_none());
    }
}

on_postgres! {
    fn every_database_has_locks_of_its_own(server: &Server) {
        let key = unique_key("databases");
        let (start, _) = server.url.rsplit_once('/').expect("a URL with a database");
        let mut holder = PgConnection::open(server);
        let mut other = PgConnection::open_url(&format!("{start}/postgres"));
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let mut other_lock = other.advisory_lock(&key).try_acquire().expect("a try").expect("a lock of its own");
        assert_eq!(other_lock.holders().expect("holders").len(), 1);
        assert!(other_lock.is_held().expect("an answer"));
        lock.release().expect("a release");
        assert!(other_lock.is_held().expect("an answer"));
        other_lock.release().expect("a release");
    }
}
