//! The round trips that the documentation states, counted on the wire.
//!
//! The first use of a statement prepares it, so everything is done once before it is counted.

use std::time::Duration;

use diesel::{Connection, MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Proxy, Server, TestConnection, on_every_server, on_mysql, on_postgres, unique_key,
};

use crate::observe::{LockTestConnection, on_connection};

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

/// A connection through a proxy that counts.
struct Counted<C> {
    conn: C,
    proxy: Proxy,
}

impl<C: LockTestConnection> Counted<C> {
    fn open(server: &Server) -> Self {
        let proxy = Proxy::start(server);
        let conn = C::open_url(proxy.url());
        Self { conn, proxy }
    }

    /// The round trips of `act` once all its statements are prepared: each time the same.
    #[track_caller]
    fn count(&mut self, mut act: impl FnMut(&mut C)) -> u64 {
        let counts = [(); 3].map(|()| {
            self.proxy.reset();
            act(&mut self.conn);
            self.proxy.round_trips()
        });
        assert_eq!(counts[1], counts[2]);
        counts[2]
    }

    /// [`count`](Self::count) of what waits for a lock that is taken, and then released.
    #[track_caller]
    fn count_wait(self, server: &Server, act: fn(&mut C, &str) -> Result<(), Error>) -> u64 {
        let key = unique_key("wait");
        let (mut holder, mut observer) = (C::open(server), C::open(server));
        let Self { mut conn, proxy } = self;
        for _ in 0..2 {
            let held = holder.advisory_lock(&key).acquire().expect("a free lock");
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
            waiter.waits(&mut observer);
            held.release().expect("a release");
            conn = waiter.join();
        }
        proxy.round_trips()
    }
}

/// What comes with a lock inside a transaction: its BEGIN and COMMIT.
fn plain_transaction<C: LockTestConnection>() -> u64 {
    match C::KIND {
        Kind::Postgres => 2,
        Kind::Mysql => 6,
    }
}

fn acquire_and_release<C: LockTestConnection>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).acquire()?.release()?;
    Ok(())
}

fn acquire_within_a_minute_and_release<C: LockTestConnection>(
    conn: &mut C,
    key: &str,
) -> Result<(), Error> {
    conn.advisory_lock(key).timeout(LONG).acquire()?.release()?;
    Ok(())
}

fn transaction<C: LockTestConnection>(conn: &mut C, key: &str) -> Result<(), Error> {
    conn.advisory_lock(key).transaction(|_| Ok(()))
}

on_every_server! {
    fn a_free_lock_takes_one_and_its_release_one<C: LockTestConnection>(server: &Server) {
        let key = unique_key("free");
        let Counted { conn, proxy } = Counted::<C>::open(server);
        let mut conn = Box::new(conn);
        for prepared in [false, true] {
            proxy.reset();
            let lock = AdvisoryLock::new(conn, &key).acquire().expect("a free lock");
            let acquired = proxy.round_trips();
            proxy.reset();
            conn = lock.release().expect("a release");
            if prepared {
                assert_eq!((acquired, proxy.round_trips()), (1, 1));
            }
        }
        let mut counted = Counted { conn: *conn, proxy };
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).try_acquire().expect("a try").expect("a free lock"))), 2);
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).timeout(LONG).acquire().expect("a free lock"))), 2);
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).poll_every(LONG).acquire().expect("a free lock"))), 2);
        assert_eq!(counted.count(|conn| conn.advisory_lock(&key).run(|_| Ok::<_, Error>(())).expect("a free lock")), 2);
    }

    fn a_lock_that_is_not_acquired_takes_none<C: LockTestConnection>(server: &Server) {
        let mut counted = Counted::<C>::open(server);
        let key = unique_key("none");
        assert_eq!(counted.count(|conn| drop(conn.advisory_lock(&key).timeout(LONG))), 0);
    }

    fn is_held_takes_one<C: LockTestConnection>(server: &Server) {
        let Counted { conn, proxy } = Counted::<C>::open(server);
        let mut lock = AdvisoryLock::new(Box::new(conn), unique_key("is_held")).acquire().expect("a free lock");
        for prepared in [false, true] {
            proxy.reset();
            assert!(lock.is_held().expect("an answer"));
            assert!(!prepared || proxy.round_trips() == 1);
        }
    }

    fn holders_takes_one_or_on_mysql_two<C: LockTestConnection>(server: &Server) {
        let key = unique_key("holders");
        let mut counted = Counted::<C>::open(server);
        let free = counted.count(|conn| drop(conn.advisory_lock(&key).holders().expect("holders")));
        let mut holder = C::open(server);
        let _held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let held = counted.count(|conn| drop(conn.advisory_lock(&key).holders().expect("holders")));
        match C::KIND {
            Kind::Postgres => assert_eq!((free, held), (1, 1)),
            Kind::Mysql => assert!(free == 2 && held <= 2, "{free}, {held}"),
        }
    }

    fn a_lock_that_is_taken_takes_one_to_try_and_each_poll_one<C: LockTestConnection>(server: &Server) {
        let key = unique_key("taken");
        let mut counted = Counted::<C>::open(server);
        let mut holder = C::open(server);
        let _held = holder.advisory_lock(&key).acquire().expect("a free lock");
        assert_eq!(counted.count(|conn| assert!(conn.advisory_lock(&key).try_acquire().expect("a try").is_none())), 1);
        // One at first, and one at the end: the interval is longer than the limit.
        let polls = counted.count(|conn| {
            let lock = conn.advisory_lock(&key).timeout(SHORT).poll_every(LONG);
            assert!(lock.try_acquire().expect("a try").is_none());
        });
        assert_eq!(polls, 2);
    }

    fn a_wait_takes_two_on_postgres_and_three_on_mysql<C: LockTestConnection>(server: &Server) {
        const RELEASE: u64 = 1;
        let unlimited = Counted::<C>::open(server).count_wait(server, acquire_and_release);
        let limited = Counted::<C>::open(server).count_wait(server, acquire_within_a_minute_and_release);
        let expected = match C::KIND {
            Kind::Postgres => 2,
            Kind::Mysql => 3,
        };
        assert_eq!([unlimited, limited], [expected + RELEASE; 2]);
    }

    fn a_transaction_under_a_free_lock<C: LockTestConnection>(server: &Server) {
        let key = unique_key("transaction");
        let mut counted = Counted::<C>::open(server);
        let plain = counted.count(|conn| conn.transaction(|_| Ok::<_, Error>(())).expect("a transaction"));
        assert_eq!(plain, plain_transaction::<C>());
        let locked = counted.count(|conn| transaction(conn, &key).expect("a free lock"));
        match C::KIND {
            Kind::Postgres => assert_eq!(locked, plain),
            Kind::Mysql => assert_eq!(locked, plain + 2),
        }
    }

    fn a_transaction_under_a_lock_that_is_taken<C: LockTestConnection>(server: &Server) {
        let expected = match C::KIND {
            Kind::Postgres => 3,
            Kind::Mysql => 3 + plain_transaction::<C>() + 1,
        };
        assert_eq!(Counted::<C>::open(server).count_wait(server, transaction), expected);
    }

    fn inside_a_transaction_a_lock_takes_one_and_its_release_two_on_postgres<C: LockTestConnection>(server: &Server) {
        let key = unique_key("inside");
        let mut counted = Counted::<C>::open(server);
        let both = match C::KIND {
            Kind::Postgres => 3,
            Kind::Mysql => 2,
        };
        let free = counted.count(|conn| {
            conn.transaction(|conn| {
                conn.advisory_lock(&key).inside_transaction().acquire()?.release()?;
                Ok::<_, Error>(())
            })
            .expect("a free lock");
        });
        assert_eq!(free, plain_transaction::<C>() + both);
    }
}

/// The round trips of a wait that times out, in `acquire` (which tells the holders) and in `try_acquire`.
fn timeouts<C: LockTestConnection>(server: &Server, prepare: &str) -> [u64; 2] {
    let key = unique_key("timeout");
    let mut counted = Counted::<C>::open(server);
    if !prepare.is_empty() {
        counted.conn.execute_sql(prepare);
    }
    let mut holder = C::open(server);
    let _held = holder.advisory_lock(&key).acquire().expect("a free lock");
    let acquire = counted.count(|conn| {
        let error = conn.advisory_lock(&key).timeout(SHORT).acquire().map(drop);
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
    });
    let try_acquire = counted.count(|conn| {
        assert!(
            conn.advisory_lock(&key)
                .timeout(SHORT)
                .try_acquire()
                .expect("a try")
                .is_none()
        );
    });
    [acquire, try_acquire]
}

on_postgres! {
    fn a_timeout_takes_one_more_on_postgres(server: &Server) {
        assert_eq!(timeouts::<PgConnection>(server, ""), [3, 2]);
    }

    fn at_repeatable_read_a_transaction_takes_six_and_seven_if_the_lock_is_taken(server: &Server) {
        const REPEATABLE: &str = "SET default_transaction_isolation = 'repeatable read'";
        let key = unique_key("repeatable");
        let mut counted = Counted::<PgConnection>::open(server);
        counted.conn.execute_sql(REPEATABLE);
        assert_eq!(counted.count(|conn| transaction(conn, &key).expect("a free lock")), 6);
        assert_eq!(counted.count_wait(server, transaction), 7);
    }

    fn a_transactions_lock_takes_one_and_two_if_it_is_taken(server: &Server) {
        let key = unique_key("xact");
        let mut counted = Counted::<PgConnection>::open(server);
        let in_transaction = |conn: &mut PgConnection, act: &dyn Fn(&mut PgConnection) -> Result<(), Error>| {
            conn.transaction(|conn| act(conn)).expect("a transaction");
        };
        assert_eq!(counted.count(|conn| in_transaction(conn, &|conn| conn.advisory_xact_lock(&key).acquire())), 2 + 1);
        assert_eq!(
            counted.count(|conn| in_transaction(conn, &|conn| conn.advisory_xact_lock(&key).try_acquire().map(drop))),
            2 + 1
        );
        assert_eq!(
            counted.count(|conn| in_transaction(conn, &|conn| conn.advisory_xact_lock(&key).holders().map(drop))),
            2 + 1
        );
        // SAVEPOINT, lock, RELEASE SAVEPOINT.
        assert_eq!(counted.count(|conn| in_transaction(conn, &|conn| transaction(conn, &key))), 2 + 3);

        let mut holder = PgConnection::open(server);
        let held = holder.advisory_lock(&key).acquire().expect("a free lock");
        let taken = counted.count(|conn| {
            in_transaction(conn, &|conn| {
                assert!(!conn.advisory_xact_lock(&key).try_acquire()?);
                Ok(())
            });
        });
        assert_eq!(taken, 2 + 1);
        let timed_out = counted.count(|conn| {
            in_transaction(conn, &|conn| {
                let error = conn.advisory_xact_lock(&key).timeout(SHORT).acquire();
                assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
                Ok(())
            });
        });
        assert_eq!(timed_out, 2 + 4);
        held.release().expect("a release");
        let waited = counted.count_wait(server, |conn, key| {
            conn.transaction(|conn| conn.advisory_xact_lock(key).acquire())
        });
        assert_eq!(waited, 2 + 2);
    }

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
