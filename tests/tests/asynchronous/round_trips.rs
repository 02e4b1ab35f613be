//! Round trips that sync connections do not take, or not as many of.

use std::time::Duration;

use diesel_async::{AsyncConnection, AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{
    AsyncTestConnection, Kind, Server, on_every_network_server_async, on_mysql_async,
    on_postgres_async, unique_key,
};

use crate::both::round_trips::{Counted, acquire_and_release, timeouts};
use crate::support::*;

const LONG: Duration = Duration::from_secs(60);

/// BEGIN and COMMIT.
const PLAIN_TRANSACTION: u64 = 2;

pub(crate) fn plain_transaction(_: Kind) -> u64 {
    PLAIN_TRANSACTION
}

on_every_network_server_async! {
    async fn a_future_that_is_not_polled_takes_none_and_locks_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_none");
        let (mut counted, mut observer) = (Counted::<C>::open(server).await, C::observer(server));
        let trips = counted.count(async |conn| {
            let acquire = conn.advisory_lock(&key).timeout(LONG).acquire();
            assert_free(&mut observer, &key);
            drop(acquire);
        });
        assert_eq!(trips.await, 0);
        assert_free(&mut observer, &key);
        assert_clean(&mut counted.conn, &mut observer).await;
    }

    async fn inside_a_transaction_a_lock_takes_two_and_so_does_its_release_on_postgres<C: LockTest>(server: &Server) {
        let key = unique_key("async_trips_inside");
        let mut counted = Counted::<C>::open(server).await;
        let both = match C::KIND {
            Kind::Postgres => 2 + 2,
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
            Kind::Mysql => 1 + 1,
        };
        let free = counted.count(async |conn| {
            let transaction = conn.transaction(async |conn| {
                conn.advisory_lock(&key).inside_transaction().acquire().await?.release().await?;
                Ok::<_, Error>(())
            });
            transaction.await.expect("a free lock");
        });
        assert_eq!(free.await, PLAIN_TRANSACTION + both);
    }
}

on_postgres_async! {
    async fn a_wait_inside_a_transaction_takes_two(server: &Server) {
        let mut counted = Counted::<AsyncPgConnection>::open(server).await;
        let waited = counted.count_wait(server, async |conn, key| {
            conn.transaction(async |conn| {
                conn.advisory_lock(key).inside_transaction().acquire().await?.release().await?;
                Ok(())
            })
            .await
        });
        assert_eq!(waited.await, PLAIN_TRANSACTION + 2 + 2);
    }
}

on_postgres_async! {
    /// One waits, two make sure that nothing is held by a statement that is not kept, and one asks who has the lock.
    async fn a_timeout_takes_four_and_three_if_nobody_asks_who_has_the_lock(server: &Server) {
        let [acquire, try_acquire] = timeouts::<AsyncPgConnection>(server, "").await;
        // To close that statement may take one of its own.
        assert!((4..=5).contains(&acquire), "{acquire}");
        assert!((3..=4).contains(&try_acquire), "{try_acquire}");
    }
}

/// The round trips of `act`, the second time.
async fn second_time(
    counted: &mut Counted<AsyncMysqlConnection>,
    act: impl AsyncFn(&mut AsyncMysqlConnection),
) -> u64 {
    act(&mut counted.conn).await;
    counted.proxy.reset();
    act(&mut counted.conn).await;
    counted.proxy.round_trips()
}

/// The limits of a session that a wait does not heed.
const CAP: &str = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";

on_mysql_async! {
    async fn a_timeout_of_whole_seconds_takes_one_and_the_question_for_the_holders_two_or_four(server: &Server) {
        const SECOND: Duration = Duration::from_secs(1);
        let key = unique_key("async_trips_second");
        let mut observer = AsyncMysqlConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let mut counted = Counted::<AsyncMysqlConnection>::open(server).await;
        for cap in ["", CAP] {
            if !cap.is_empty() {
                counted.conn.execute_sql(cap).await;
            }
            let tried = second_time(&mut counted, async |conn| {
                let lock = conn.advisory_lock(&key).timeout(SECOND);
                assert!(lock.try_acquire().await.expect("a try").is_none());
            });
            assert_eq!(tried.await, 1);
            let acquired = second_time(&mut counted, async |conn| {
                let error = conn.advisory_lock(&key).timeout(SECOND).acquire().await.map(drop);
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
            });
            let acquired = acquired.await;
            assert!([1 + 2, 1 + 4].contains(&acquired), "{acquired}");
        }
    }

    /// There the wait is ended by the statement's limit, which stands in the text, and is a power of two. That is an error,
    /// whose number has to be asked for.
    async fn a_timeout_below_a_second_takes_up_to_three_for_each_of_up_to_ten_steps_on_mysql(server: &Server) {
        let key = unique_key("async_trips_below");
        let mut observer = AsyncMysqlConnection::observer(server);
        assert!(try_lock(&mut observer, &key));
        let mut counted = Counted::<AsyncMysqlConnection>::open(server).await;
        for millis in [1, 150, 999] {
            let tried = second_time(&mut counted, async |conn| {
                let lock = conn.advisory_lock(&key).timeout(Duration::from_millis(millis));
                assert!(lock.try_acquire().await.expect("a try").is_none());
            });
            let tried = tried.await;
            if server.is_mariadb() {
                assert_eq!(tried, 1);
            } else {
                assert!((1..=30).contains(&tried), "{millis} ms: {tried}");
            }
        }
    }

    async fn a_limit_of_the_session_takes_none_more(server: &Server) {
        let mut counted = Counted::<AsyncMysqlConnection>::open(server).await;
        counted.conn.execute_sql(CAP).await;
        assert_eq!(counted.count_wait(server, acquire_and_release).await, 1 + 1);
    }
}
