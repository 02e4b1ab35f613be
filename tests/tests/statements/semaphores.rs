//! No key, no limit and no number of permits stands in the text of a semaphore's statement.

use std::time::Duration;

use diesel::{MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt as _, Error, LockConnection};
use dlock_diesel_async::AdvisoryLockExt as _;
use dlock_tests::{AsyncTestConnection, Server, TestConnection, block_on, unique_key};

use crate::fresh_database::FreshDatabase;
use crate::{mysql, postgres};

const CALLS: u32 = 60;

/// Longer than a turn on PostgreSQL, for some.
fn limit(number: u32) -> Duration {
    Duration::from_millis(match number % 20 {
        0 => u64::from(1_000 + number),
        _ => u64::from(1 + number % 13),
    })
}

/// Slots that are free and slots that are taken, with another key, limit and number of permits each time.
fn ask<C: TestConnection + LockConnection>(server: &Server) {
    let (mut holder, mut conn) = (C::open(server), C::open(server));
    for number in 0..CALLS {
        let (key, permits) = (unique_key("texts"), 1 + 3 * number);
        let free = conn.advisory_semaphore(&key, permits).acquire();
        let mut inside = free.expect("a free slot");
        assert!(inside.is_held().expect("an answer"));
        inside.release().expect("a release");
        let ran = conn
            .advisory_semaphore(&key, permits)
            .transaction(|_| Ok::<_, Error>(()));
        ran.expect("a transaction");
        let held = holder
            .advisory_semaphore(&key, 1)
            .acquire()
            .expect("a free slot");
        let late = conn
            .advisory_semaphore(&key, 1)
            .timeout(limit(number))
            .acquire();
        assert!(matches!(late.map(drop), Err(Error::Timeout { .. })));
        held.release().expect("a release");
    }
}

async fn ask_async<C>(server: &Server)
where
    C: AsyncTestConnection,
{
    let (mut holder, mut conn) = (C::open(server).await, C::open(server).await);
    for number in 0..CALLS {
        let (key, permits) = (unique_key("texts_async"), 1 + 3 * number);
        let free = conn.advisory_semaphore(&key, permits).acquire().await;
        let mut inside = free.expect("a free slot");
        assert!(inside.is_held().await.expect("an answer"));
        inside.release().await.expect("a release");
        let held = holder
            .advisory_semaphore(&key, 1)
            .acquire()
            .await
            .expect("a free slot");
        let late = conn
            .advisory_semaphore(&key, 1)
            .timeout(limit(number))
            .acquire()
            .await;
        assert!(matches!(late.map(drop), Err(Error::Timeout { .. })));
        held.release().await.expect("a release");
        if number % 6 == 0 {
            let wait = conn.advisory_semaphore(&key, permits).acquire();
            let _ = tokio::time::timeout(Duration::ZERO, wait).await;
            conn = C::open(server).await;
        }
    }
}

#[test]
fn many_semaphores_add_at_most_30_entries_to_pg_stat_statements() {
    for server in postgres::counting_servers() {
        let fresh = FreshDatabase::<PgConnection>::create(server);
        ask::<PgConnection>(&fresh.server);
        block_on(ask_async::<diesel_async::AsyncPgConnection>(&fresh.server));
        let database = fresh.server.url.rsplit('/').next().expect("a database");
        let texts = postgres::texts(server, database);
        eprintln!("{}: {} texts", server.name, texts.len());
        assert!(
            (5..=30).contains(&texts.len()),
            "{server}:\n{}",
            texts.join("\n")
        );
    }
}

#[test]
fn many_semaphores_add_at_most_25_statement_digests() {
    for server in mysql::counting_servers() {
        let fresh = FreshDatabase::<MysqlConnection>::create(server);
        ask::<MysqlConnection>(&fresh.server);
        block_on(ask_async::<diesel_async::AsyncMysqlConnection>(
            &fresh.server,
        ));
        let database = fresh.server.url.rsplit('/').next().expect("a database");
        let digests = mysql::digests(server, database);
        eprintln!("{}: {} digests", server.name, digests.len());
        // MariaDB counts none that is prepared.
        assert!(
            (2..=25).contains(&digests.len()),
            "{server}:\n{}",
            digests.join("\n")
        );
    }
}
