//! Round trips that async connections do not take, or not as many of.

use std::time::Duration;

use diesel::{Connection, MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Server, TestConnection, on_every_network_server, on_mysql, on_postgres, unique_key,
};

use crate::both::round_trips::{Counted, acquire_and_release, timeouts};
use crate::support::*;

const LONG: Duration = Duration::from_secs(60);

/// BEGIN and COMMIT. Diesel's `batch_execute` takes three for each on MySQL.
pub(crate) fn plain_transaction(kind: Kind) -> u64 {
    match kind {
        Kind::Postgres => 2,
        Kind::Mysql => 6,
        Kind::Sqlite => unreachable!("BUG: it has no wire"),
    }
}

/// Whether a lock inside a transaction has taken so many, or one more: on PostgreSQL it asks first whether the transaction
/// is aborted, if the name of its savepoint was used in one that was. Other tests of this process abort some.
fn is_inside(kind: Kind, taken: u64, expected: u64) -> bool {
    taken == expected || kind == Kind::Postgres && taken == expected + 1
}

on_every_network_server! {
    fn dropping_a_guard_takes_one<C: LockTest>(server: &Server) {
        let key = unique_key("trips_drop");
        let mut counted = Counted::<C>::open(server);
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).try_acquire().expect("a try").expect("a free lock"))), 2);
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).timeout(LONG).acquire().expect("a free lock"))), 2);
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).poll_every(LONG).acquire().expect("a free lock"))), 2);
    }

    fn inside_a_transaction_a_lock_takes_one_and_its_release_two_on_postgres<C: LockTest>(server: &Server) {
        let key = unique_key("trips_inside");
        let mut counted = Counted::<C>::open(server);
        let both = match C::KIND {
            Kind::Postgres => 3,
            Kind::Mysql => 2,
            Kind::Sqlite => unreachable!("BUG: it has no wire"),
        };
        let free = counted.count(|conn| {
            conn.transaction(|conn| {
                conn.advisory_lock(&key).inside_transaction().acquire()?.release()?;
                Ok::<_, Error>(())
            })
            .expect("a free lock");
        });
        assert!(is_inside(C::KIND, free, plain_transaction(C::KIND) + both), "{free}");
    }
}

/// The round trips of what is granted the lock in the second turn of its wait, and then releases it.
fn in_the_second_turn(
    server: &Server,
    act: impl Fn(&mut PgConnection, &str) -> Result<(), Error> + Copy + Send + 'static,
) -> u64 {
    let key = unique_key("trips_turns");
    let mut observer = PgConnection::open(server);
    let Counted { mut conn, proxy } = Counted::<PgConnection>::open(server);
    // The first time prepares.
    for prepared in [false, true] {
        assert!(try_lock(&mut observer, &key));
        // No question of the test's own is counted.
        let waiter = on_connection(conn, {
            let key = key.clone();
            move |mut conn, stage| {
                stage.pause();
                act(&mut conn, &key).expect("the lock");
                conn
            }
        });
        proxy.reset();
        waiter.go_on();
        waiter.waits_again(&mut observer);
        unlock(&mut observer, &key);
        conn = waiter.join();
        if prepared {
            return proxy.round_trips();
        }
    }
    unreachable!("BUG: it returns")
}

on_postgres! {
    fn a_wait_inside_a_transaction_takes_one(server: &Server) {
        let waited = Counted::<PgConnection>::open(server).count_wait(server, |conn, key| {
            conn.transaction(|conn| {
                conn.advisory_lock(key).inside_transaction().acquire()?.release()?;
                Ok(())
            })
        });
        assert!(is_inside(Kind::Postgres, waited, 2 + 1 + 2), "{waited}");
    }

    /// One waits, one makes sure that nothing is held, and one asks who has the lock.
    fn a_timeout_takes_three_and_two_if_nobody_asks_who_has_the_lock(server: &Server) {
        assert_eq!(timeouts::<PgConnection>(server, ""), [3, 2]);
    }

    /// One prepares it, one waits, one reads what came of it.
    fn a_further_turn_takes_three_and_the_end_of_the_turn_before_it_one(server: &Server) {
        let acquired = in_the_second_turn(server, acquire_and_release);
        assert_eq!(acquired, 1 + 1 + 3 + 1);
        let begun = in_the_second_turn(server, |conn, key| conn.advisory_lock(key).transaction(|_| Ok(())));
        assert_eq!(begun, 1 + 1 + 3 + 1);
    }

    fn a_further_turn_inside_a_transaction_takes_three(server: &Server) {
        let plain = plain_transaction(Kind::Postgres);
        // Before it one tries, one waits, one undoes that.
        let transactions = in_the_second_turn(server, |conn, key| {
            conn.transaction(|conn| conn.advisory_xact_lock(key).acquire())
        });
        assert_eq!(transactions, plain + 3 + 3);
        // Before it one waits, one undoes that, one makes sure that nothing is held; after it one sets the savepoint.
        let inside = in_the_second_turn(server, |conn, key| {
            conn.transaction(|conn| {
                conn.advisory_lock(key).inside_transaction().acquire()?.release()?;
                Ok(())
            })
        });
        assert!(is_inside(Kind::Postgres, inside, plain + 3 + 3 + 1 + 2), "{inside}");
    }
}

/// The round trips of `act`, the second time.
fn second_time(conn: &mut Counted<MysqlConnection>, act: impl Fn(&mut MysqlConnection)) -> u64 {
    act(&mut conn.conn);
    conn.proxy.reset();
    act(&mut conn.conn);
    conn.proxy.round_trips()
}

/// The limits of a session that a wait does not heed.
const CAP: &str = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";

on_mysql! {
    fn a_timeout_of_whole_seconds_takes_one_and_the_question_for_the_holders_two_or_four(server: &Server) {
        const SECOND: Duration = Duration::from_secs(1);
        let key = unique_key("trips_second");
        let mut observer = MysqlConnection::open(server);
        assert!(try_lock(&mut observer, &key));
        let mut counted = Counted::<MysqlConnection>::open(server);
        for cap in ["", CAP] {
            if !cap.is_empty() {
                counted.conn.execute_sql(cap);
            }
            let tried = second_time(&mut counted, |conn| {
                assert!(conn.advisory_lock(&key).timeout(SECOND).try_acquire().expect("a try").is_none());
            });
            assert_eq!(tried, 1);
            let acquired = second_time(&mut counted, |conn| {
                let error = conn.advisory_lock(&key).timeout(SECOND).acquire().map(drop);
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
            });
            assert!([1 + 2, 1 + 4].contains(&acquired), "{acquired}");
        }
    }

    /// There the wait is ended by the statement's limit, which stands in the text, and is a power of two. That is an error,
    /// whose number has to be asked for. Diesel's `batch_execute` takes three.
    fn a_timeout_below_a_second_takes_up_to_five_for_each_of_up_to_ten_steps_on_mysql(server: &Server) {
        let key = unique_key("trips_below");
        let mut observer = MysqlConnection::open(server);
        assert!(try_lock(&mut observer, &key));
        let mut counted = Counted::<MysqlConnection>::open(server);
        for millis in [1, 150, 999] {
            let tried = second_time(&mut counted, |conn| {
                let lock = conn.advisory_lock(&key).timeout(Duration::from_millis(millis));
                assert!(lock.try_acquire().expect("a try").is_none());
            });
            if server.is_mariadb() {
                assert_eq!(tried, 1);
            } else {
                assert!((1..=50).contains(&tried), "{millis} ms: {tried}");
            }
        }
    }

    fn a_limit_of_the_session_takes_none_more(server: &Server) {
        let mut counted = Counted::<MysqlConnection>::open(server);
        counted.conn.execute_sql(CAP);
        assert_eq!(counted.count_wait(server, acquire_and_release), 1 + 1);
    }
}
