//! Races: the server grants a lock at the moment at which the limit of the wait passes.

use std::thread;
use std::time::{Duration, Instant};

use diesel_async::AsyncMysqlConnection;
use dlock_diesel_async::AdvisoryLockExt;
use dlock_tests::{
    AsyncTestConnection, Server, number_from_environment, on_mysql_async, unique_key,
};

use crate::support::*;

const LIMIT: Duration = Duration::from_millis(4);

on_mysql_async! {
    /// MySQL may answer with a row and then with an error, because the limit has passed while it sent the row.
    async fn an_error_behind_the_answer_is_not_given_to_the_next_statement(server: &'static Server) {
        let key = unique_key("behind_a_row");
        let mut holder = AsyncMysqlConnection::observer(server);
        let mut conn = AsyncMysqlConnection::open(server).await;
        let rounds = number_from_environment::<u32>("DLOCK_RACES").unwrap_or(200);
        let [mut granted, mut timed_out] = [0; 2];
        let mut delay = LIMIT;
        // On a busy machine it takes more rounds to find the aim.
        while granted + timed_out < rounds || (granted == 0 || timed_out == 0) && granted + timed_out < 20 * rounds {
            assert!(try_lock(&mut holder, &key));
            let started = Instant::now();
            let releasing = thread::spawn({
                let key = key.clone();
                move || {
                    while started.elapsed() < delay {
                        std::hint::spin_loop();
                    }
                    unlock(&mut holder, &key);
                    holder
                }
            });
            let trying = conn.advisory_lock(&key).timeout(LIMIT).try_acquire();
            if let Some(mut lock) = trying.await.expect("no error") {
                granted += 1;
                delay += Duration::from_micros(30);
                lock.execute_sql("SELECT 1").await;
                lock.release().await.expect("a release");
            } else {
                timed_out += 1;
                delay = delay.saturating_sub(Duration::from_micros(30));
            }
            conn.execute_sql("SELECT 1").await;
            holder = releasing.join().expect("no panic");
            assert_free(&mut holder, &key);
        }
        eprintln!("behind a row on {}: {granted} granted, {timed_out} timed out", server.name);
        assert!(granted > 0 && timed_out > 0);
    }
}
