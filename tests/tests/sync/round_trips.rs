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
        assert_eq!(free, plain_transaction(C::KIND) + both);
    }
}

on_postgres! {
    fn a_wait_inside_a_transaction_takes_one(server: &Server) {
        let waited = Counted::<PgConnection>::open(server).count_wait(server, |conn, key| {
            conn.transaction(|conn| {
                conn.advisory_lock(key).inside_transaction().acquire()?.release()?;
                Ok(())
            })
        });
        assert_eq!(waited, 2 + 1 + 2);
    }
}

on_mysql! {
    /// Diesel's `batch_execute` takes three, and MySQL's timeout is an error, whose number has to be asked for.
    fn a_timeout_takes_two_more_on_mariadb_and_six_on_mysql(server: &Server) {
        let [acquire, try_acquire] = timeouts::<MysqlConnection>(server, "");
        let limited = if server.is_mariadb() { 3 } else { 3 + 5 };
        assert_eq!(try_acquire, limited);
        // Who has the lock is asked for in one way or in two.
        assert!((limited + 1..=limited + 2).contains(&acquire), "{acquire}");
    }

    fn lifting_mariadbs_cap_takes_two_batches(server: &Server) {
        let cap = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";
        let [_, plain] = timeouts::<MysqlConnection>(server, "");
        let [_, capped] = timeouts::<MysqlConnection>(server, cap);
        assert_eq!(capped, if server.is_mariadb() { plain + 6 } else { plain });
        let mut counted = Counted::<MysqlConnection>::open(server);
        counted.conn.execute_sql(cap);
        let waited = counted.count_wait(server, acquire_and_release);
        assert_eq!(waited, if server.is_mariadb() { 3 + 6 + 1 } else { 3 + 1 });
    }
}
