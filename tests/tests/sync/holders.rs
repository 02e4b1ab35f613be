//! Who has a lock, as far as the server lets this user see it.

use std::time::{Duration, SystemTime};

use diesel::{MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error, Holder, Mode};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server, on_every_server, on_mysql, on_postgres,
    unique_key,
};

use crate::observe::{
    Background, LockTestConnection, TestUser, assert_free, in_background, on_connection,
};

/// Times come from the server's clock, on MySQL and MariaDB in whole seconds.
const CLOCK: Duration = Duration::from_secs(3);

#[track_caller]
fn assert_plausible(holder: &Holder, started: SystemTime) {
    let since = holder.since.expect("a time");
    assert!(since >= started - CLOCK, "{since:?}, {started:?}");
    assert!(since <= SystemTime::now() + CLOCK, "{since:?}");
}

/// The user of the server's URL.
fn user_of(server: &Server) -> Option<&str> {
    let (_, rest) = server.url.split_once("://")?; // SQLite has none
    rest.split([':', '@']).next()
}

/// Waits for the lock and gives it back.
fn wait_and_release<C: LockTestConnection>(server: &Server, key: &str) -> Background<()> {
    let key = key.to_owned();
    in_background(server, move |mut conn: C, _| {
        conn.advisory_lock(&key)
            .acquire()
            .expect("the lock")
            .release()
            .expect("a release");
    })
}

/// Whether the server tells this connection who waits: PostgreSQL always, the others where they collect it.
fn sees_waiters<C: LockTestConnection>(conn: &mut C) -> bool {
    match C::KIND {
        Kind::Postgres | Kind::Sqlite => true,
        Kind::Mysql => conn.number(
            "SELECT COUNT(*) FROM performance_schema.setup_instruments \
             WHERE NAME = 'wait/lock/metadata/sql/mdl' AND ENABLED = 'YES' AND @@performance_schema = 1",
        ) == Some(1),
    }
}

on_every_server! {
    fn nobody_holds_a_free_lock<C: LockTestConnection>(server: &Server) {
        let mut conn = C::open(server);
        assert_eq!(conn.advisory_lock(unique_key("free")).holders().expect("holders"), []);
    }

    fn the_holder_is_told_with_its_user_and_since_when<C: LockTestConnection>(server: &Server) {
        let key = unique_key("holder");
        let started = SystemTime::now();
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let id = C::holder_id(holder.backend_id());
        let mut lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let from_outside = observer.advisory_lock(&key).holders().expect("holders");
        let from_inside = lock.holders().expect("holders");
        for holders in [from_outside, from_inside] {
            let [holder] = &holders[..] else {
                panic!("{holders:?}");
            };
            assert_eq!(holder.backend_id, id);
            assert_eq!(holder.user.as_deref(), user_of(server));
            assert_eq!(holder.mode, Mode::Exclusive);
            assert!(holder.granted);
            assert_plausible(holder, started);
            assert!(holder.to_string().starts_with(&id.to_string()), "{holder}");
        }
        lock.release().expect("a release");
        assert_eq!(observer.advisory_lock(&key).holders().expect("holders"), []);
    }

    fn waiters_come_after_the_holder_in_their_order<C: LockTestConnection>(server: &Server) {
        let key = unique_key("waiters");
        let started = SystemTime::now();
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let id = holder.backend_id();
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let waiters = [(); 2].map(|()| {
            let waiter = wait_and_release::<C>(server, &key);
            waiter.waits(&mut observer);
            waiter
        });
        let holders = observer.advisory_lock(&key).holders().expect("holders");
        let told: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.granted)).collect();
        if sees_waiters(&mut observer) {
            let mut told = told;
            if C::KIND == Kind::Mysql {
                // Its times are whole seconds.
                told[1..].sort_by_key(|(id, _)| waiters.iter().position(|waiter| waiter.id == *id));
            }
            let expected = [(id, true), (waiters[0].id, false), (waiters[1].id, false)];
            assert_eq!(told, expected.map(|(id, granted)| (C::holder_id(id), granted)));
        } else {
            assert_eq!(told, [(id, true)]);
        }
        for holder in &holders {
            assert_eq!(holder.user.as_deref(), user_of(server));
            assert_eq!(holder.mode, Mode::Exclusive);
            assert_plausible(holder, started);
        }
        lock.release().expect("a release");
        for waiter in waiters {
            waiter.join();
        }
        assert_free(&mut observer, &key);
    }

    fn keys_that_look_alike_have_holders_of_their_own<C: LockTestConnection>(server: &Server) {
        let key = unique_key("alike");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        for other in [format!("{key} "), format!(" {key}"), key.to_uppercase(), format!("{key}\0"), key.replace('/', "_")] {
            assert_eq!(conn.advisory_lock(&other).holders().expect("holders"), [], "{other:?}");
        }
    }

    fn a_timeout_names_the_holder<C: LockTestConnection>(server: &Server) {
        let key = unique_key("timeout");
        let (mut holder, mut conn) = (C::open(server), C::open(server));
        let id = C::holder_id(holder.backend_id());
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        match conn.advisory_lock(&key).timeout(Duration::from_millis(20)).acquire().map(drop) {
            Err(Error::Timeout { holders, .. }) => {
                let holders: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.granted)).collect();
                assert_eq!(holders, [(id, true)]);
            }
            result => panic!("{result:?}"),
        }
    }
}

on_every_network_server! {
    fn a_user_without_privileges_sees_less_and_no_error<C: LockTestConnection>(server: &Server) {
        let key = unique_key("restricted");
        let user = TestUser::<C>::create(server, "");
        let (mut holder, mut conn) = (C::open(server), user.open());
        let id = holder.backend_id();
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().expect("no error");
        let [seen] = &holders[..] else {
            panic!("{holders:?}");
        };
        assert_eq!((seen.backend_id, seen.mode, seen.granted), (id, Mode::Exclusive, true));
        assert_eq!(seen.since, None, "{seen:?}");
        if C::KIND == Kind::Mysql {
            assert_eq!(seen.user, None);
        }
        let error = conn.advisory_lock(&key).timeout(Duration::from_millis(20)).acquire().map(drop);
        assert!(matches!(&error, Err(Error::Timeout { holders, .. }) if holders.len() == 1), "{error:?}");
        lock.release().expect("a release");
        // It can lock, too, and sees itself.
        let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        let own = lock.holders().expect("no error");
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].user.as_deref(), Some(&*user));
    }
}

on_postgres! {
    fn application_names_are_told(server: &Server) {
        let key = unique_key("application");
        let [mut holder, mut conn] = [(); 2].map(|()| PgConnection::open(server));
        holder.execute_sql("SET application_name = 'billing'");
        let id = holder.backend_id();
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().expect("holders");
        assert_eq!(holders[0].application_name.as_deref(), Some("billing"));
        assert_eq!(holders[0].to_string(), format!("{id} (billing)"));
        let error = conn.advisory_lock(&key).timeout(Duration::ZERO).acquire().map(drop).expect_err("held");
        assert!(error.to_string().ends_with(&format!(": held by {id} (billing)")), "{error}");
        lock.release().expect("a release");
    }

    fn shared_holders_and_a_waiting_writer_are_told_apart(server: &Server) {
        let key = unique_key("modes");
        let [mut first, mut second, mut observer] = [(); 3].map(|()| PgConnection::open(server));
        let mut ids = [first.backend_id(), second.backend_id()];
        ids.sort_unstable();
        let readers = [&mut first, &mut second]
            .map(|conn| conn.advisory_lock(&key).shared().acquire().expect("a shared lock"));
        let writer = wait_and_release::<PgConnection>(server, &key);
        writer.waits(&mut observer);
        let holders = observer.advisory_lock(&key).holders().expect("holders");
        let told: Vec<_> = holders.iter().map(|holder| (holder.backend_id, holder.mode, holder.granted)).collect();
        assert_eq!(
            told,
            [
                (ids[0], Mode::Shared, true),
                (ids[1], Mode::Shared, true),
                (writer.id, Mode::Exclusive, false),
            ]
        );
        for reader in readers {
            reader.release().expect("a release");
        }
        writer.join();
    }

    fn a_transactions_lock_has_holders_too(server: &Server) {
        let key = unique_key("xact");
        let mut observer = PgConnection::open(server);
        let holder = on_connection(PgConnection::open(server), {
            let key = key.clone();
            move |mut conn, stage| {
                conn.advisory_lock(&key).transaction(|conn| {
                    let id = conn.backend_id();
                    let holders = conn.advisory_xact_lock(&key).holders()?;
                    assert_eq!(holders.iter().map(|holder| holder.backend_id).collect::<Vec<_>>(), [id]);
                    stage.say("locked");
                    stage.pause();
                    Ok::<_, Error>(())
                })
            }
        });
        holder.says("locked");
        let holders = observer.advisory_lock(&key).holders().expect("holders");
        assert_eq!(holders.iter().map(|holder| holder.backend_id).collect::<Vec<_>>(), [holder.id]);
        holder.go_on();
        holder.join().expect("a transaction");
    }

    fn numbers_and_pairs_are_not_mixed_up(server: &Server) {
        let seed = unique_key("numbers");
        let number = seed.bytes().fold(-3, |hash: i64, byte| hash.wrapping_mul(41).wrapping_add(byte.into()));
        let pair = ((number >> 32) as i32, number as i32);
        let [mut holder, mut conn] = [(); 2].map(|()| PgConnection::open(server));
        let lock = holder.advisory_lock(number).acquire().expect("a free lock");
        assert_eq!(conn.advisory_lock(number).holders().expect("holders").len(), 1);
        assert_eq!(conn.advisory_lock(pair).holders().expect("holders"), []);
        lock.release().expect("a release");
        let _lock = holder.advisory_lock(pair).acquire().expect("a free lock");
        assert_eq!(conn.advisory_lock(pair).holders().expect("holders").len(), 1);
        assert_eq!(conn.advisory_lock(number).holders().expect("holders"), []);
    }
}

on_mysql! {
    fn there_are_no_application_names(server: &Server) {
        let key = unique_key("application");
        let [mut holder, mut conn] = [(); 2].map(|()| MysqlConnection::open(server));
        let id = holder.backend_id();
        let _lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let holders = conn.advisory_lock(&key).holders().expect("holders");
        assert_eq!(holders[0].application_name, None);
        assert_eq!(holders[0].to_string(), format!("{id} ({})", user_of(server).expect("a user")));
    }
}
