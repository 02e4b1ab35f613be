//! What a lock borrows or owns: pooled connections, whose next user never holds a lock that it did not take; boxes,
//! wrappers, and enums of connections.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use diesel::connection::{SimpleConnection, TransactionManager};
use diesel::r2d2::{self, ConnectionManager, PooledConnection};
use diesel::{Connection, MysqlConnection, PgConnection, QueryResult};
use dlock_diesel::{AdvisoryLock, AdvisoryLockExt, Error};
use dlock_tests::{
    Kind, Proxy, Server, TestConnection, on_every_network_server, on_every_server, on_mysql,
    on_postgres, unique_key, wait_for,
};

use crate::support::*;

const SOON: Duration = Duration::from_millis(30);

type Pool<C> = r2d2::Pool<ConnectionManager<C>>;
type Pooled<C> = PooledConnection<ConnectionManager<C>>;

/// A pool that trusts its connections: what is discarded is so because it was marked broken.
fn pool<C: LockTest>(url: &str, size: u32) -> Pool<C> {
    r2d2::Pool::builder()
        .max_size(size)
        .test_on_check_out(false)
        .connection_customizer(C::customizer())
        .build(ConnectionManager::new(url))
        .expect("the server answers")
}

/// Every connection of the pool works, is in no transaction, and holds no lock.
#[track_caller]
fn assert_next_users_are_clean<C: LockTest>(pool: &Pool<C>, observer: &mut C, key: &str) {
    wait_until_free(observer, key);
    let mut users: Vec<Pooled<C>> = (0..pool.max_size())
        .map(|_| pool.get().expect("a connection"))
        .collect();
    for user in &mut users {
        assert_clean::<C>(user, observer);
        let id = user.backend_id();
        let guard = user.advisory_lock(key).acquire().expect("the lock is free");
        assert_held_by(observer, key, id);
        guard.release().expect("held");
    }
    assert_free(observer, key);
}

/// Uses a connection of a pool of one and of three, in the way of `use_it`, and looks at who comes next.
fn next_user_is_clean<C: LockTest>(server: &Server, use_it: impl Fn(&Pool<C>, &mut C, &str)) {
    let mut observer = C::open(server);
    for size in [1, 3] {
        let key = unique_key("pool");
        let pool = pool::<C>(&server.url, size);
        use_it(&pool, &mut observer, &key);
        assert_next_users_are_clean(&pool, &mut observer, &key);
    }
}

/// Whether the pool of one keeps its connection.
fn is_kept<C: LockTest>(server: &Server, use_it: impl Fn(Pooled<C>, &mut C, &str)) -> bool {
    let key = unique_key("pool_kept");
    let pool = pool::<C>(&server.url, 1);
    let id = pool.get().expect("a connection").backend_id();
    use_it(
        pool.get().expect("a connection"),
        &mut C::open(server),
        &key,
    );
    pool.get().expect("a connection").backend_id() == id
}

on_every_server! {
    fn a_pooled_connection_takes_locks_by_reference<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            let mut pooled = pool.get().expect("a connection");
            let id = pooled.backend_id();
            let guard = pooled.advisory_lock(key).acquire().expect("the lock is free");
            assert_held_by(observer, key, id);
            let pooled: &mut Pooled<C> = guard.release().expect("held");
            assert_free(observer, key);
            drop(pooled.advisory_lock(key).try_acquire().expect("an answer").expect("free"));
            assert_free(observer, key);
            pooled.advisory_lock(key).run(|_| Ok::<_, Error>(())).expect("free");
            pooled
                .advisory_lock(key)
                .transaction(|conn: &mut Pooled<C>| {
                    assert_held_by(observer, key, conn.backend_id());
                    Ok::<_, Error>(())
                })
                .expect("free");
        });
    }

    fn a_lock_can_own_its_pooled_connection_and_move_to_a_thread<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            let pooled = pool.get().expect("a connection");
            let mut guard = AdvisoryLock::new(pooled, key)
                .acquire()
                .expect("the lock is free");
            let id = guard.backend_id();
            thread::spawn({
                let key = key.to_owned();
                let mut thread_observer = C::open(server);
                move || {
                    assert_held_by(&mut thread_observer, &key, guard.backend_id());
                    drop(guard);
                }
            })
            .join()
            .expect("the thread's assertions");
            assert_free(observer, key);

            let guard = AdvisoryLock::new(pool.get().expect("a connection"), key)
                .acquire()
                .expect("free");
            let mut pooled: Pooled<C> = guard.release().expect("held");
            assert!(pool.max_size() > 1 || pooled.backend_id() == id);
        });
    }

    fn after_a_panic_with_a_live_guard_on_another_thread_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            let conn = pool.get().expect("a connection");
            let mut guard = AdvisoryLock::new(conn, key).acquire().expect("free");
            assert_held_by(observer, key, guard.backend_id());
            thread::spawn(move || {
                let _guard = guard;
                panic_quietly()
            })
            .join()
            .expect_err("a panic");
        });
    }

    fn healthy_connections_are_kept<C: LockTest>(server: &Server) {
        assert!(is_kept::<C>(server, |conn, _, key| drop(AdvisoryLock::new(conn, key).acquire().expect("free"))));
        assert!(is_kept::<C>(server, |conn, _, key| {
            AdvisoryLock::new(conn, key).run(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
        }));
        assert!(is_kept::<C>(server, |conn, _, key| {
            AdvisoryLock::new(conn, key).transaction(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
        }));
        assert!(is_kept::<C>(server, |conn, observer, key| {
            assert!(try_lock(observer, key));
            let result = AdvisoryLock::new(conn, key).timeout(SOON).acquire();
            assert!(matches!(result, Err(Error::Timeout { .. })));
        }));
        assert!(is_kept::<C>(server, |conn, observer, key| {
            assert!(try_lock(observer, key));
            assert!(AdvisoryLock::new(conn, key).try_acquire().expect("an answer").is_none());
        }));
        assert!(is_kept::<C>(server, |conn, observer, key| {
            assert!(try_lock(observer, key));
            let result = AdvisoryLock::new(conn, key).timeout(SOON).transaction(|_| Ok::<_, Error>(()));
            assert!(matches!(result, Err(Error::Timeout { .. })));
        }));
    }

    fn after_an_error_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, _, key| {
            let mut conn = pool.get().expect("a connection");
            conn.advisory_lock(key).run(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
            conn.advisory_lock(key).transaction(|_| Err::<(), _>(AppError::Own)).expect_err("its own");
            let bad = "SELECT no_such_column";
            conn.advisory_lock(key).run(|conn| conn.batch_execute(bad)).expect_err("no such column");
            conn.advisory_lock(key).transaction(|conn| conn.batch_execute(bad)).expect_err("no such column");
        });
    }

    fn after_a_panic_in_run_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, _, key| {
            let mut conn = pool.get().expect("a connection");
            catch_unwind(AssertUnwindSafe(|| {
                conn.advisory_lock(key).run(|_| -> Result<(), Error> { panic_quietly() })
            }))
            .expect_err("a panic");
        });
    }

    fn after_a_panic_in_a_transaction_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        let table = Table::new(server);
        next_user_is_clean::<C>(server, |pool, _, key| {
            let mut conn = pool.get().expect("a connection");
            catch_unwind(AssertUnwindSafe(|| {
                conn.advisory_lock(key).transaction(|conn| -> QueryResult<()> {
                    conn.batch_execute(&table.insert(1))?;
                    panic_quietly()
                })
            }))
            .expect_err("a panic");
            catch_unwind(AssertUnwindSafe(|| {
                conn.advisory_lock(key).run(|conn| -> QueryResult<()> {
                    begin(conn);
                    conn.batch_execute(&table.insert(2))?;
                    panic_quietly()
                })
            }))
            .expect_err("a panic");
        });
        assert_eq!(table.rows(&mut C::open(server)), 0);
    }

    fn after_a_timeout_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            assert!(try_lock(observer, key));
            let mut conn = pool.get().expect("a connection");
            conn.advisory_lock(key).timeout(SOON).acquire().map(drop).expect_err("it is held");
            conn.advisory_lock(key).timeout(SOON).transaction(|_| Ok::<_, Error>(())).expect_err("it is held");
            assert!(conn.advisory_lock(key).try_acquire().expect("an answer").is_none());
            drop(conn);
            unlock(observer, key);
        });
    }

    /// A forgotten guard keeps what it owns: the pool has one connection less.
    fn a_forgotten_guard_that_owns_its_connection_keeps_both<C: LockTest>(server: &Server) {
        let key = unique_key("pool_forget_owned");
        let mut observer = C::open(server);
        let pool = pool::<C>(&server.url, 1);
        let mut guard = AdvisoryLock::new(pool.get().expect("a connection"), &key).acquire().expect("free");
        let id = guard.backend_id();
        std::mem::forget(guard);
        assert_held_by(&mut observer, &key, id);
        pool.get_timeout(SOON).map(drop).expect_err("the only connection is forgotten");
    }

    /// The one way to hand a lock on: Rust lets nobody see that a borrow was forgotten. The lock is still exclusive,
    /// and ends with the connection; but its next user holds it, too.
    fn a_forgotten_guard_that_borrows_leaves_the_lock_with_the_pooled_connection<C: LockTest>(server: &Server) {
        let key = unique_key("pool_forget_borrowed");
        let mut observer = C::open(server);
        let pool = pool::<C>(&server.url, 1);
        let mut pooled = pool.get().expect("a connection");
        let id = pooled.backend_id();
        std::mem::forget(pooled.advisory_lock(&key).acquire().expect("free"));
        drop(pooled);
        let mut next = pool.get().expect("a connection");
        assert_eq!(next.backend_id(), id);
        assert_held_by(&mut observer, &key, id);
        drop(next);
        drop(pool);
        wait_until_free(&mut observer, &key);
    }

    fn locks_of_one_pool_exclude_each_other<C: LockTest>(server: &Server) {
        let key = unique_key("pool_exclusion");
        let table = Table::counter(server);
        let pool = pool::<C>(&server.url, 4);
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let mut conn = pool.get().expect("a connection");
                        conn.advisory_lock(&key).run(|conn| table.increment::<C>(conn)).expect("the lock");
                    }
                });
            }
        });
        let mut observer = C::open(server);
        assert_eq!(table.value(&mut observer), 60);
        assert_next_users_are_clean(&pool, &mut observer, &key);
    }

    fn whatever_derefs_to_a_connection_can_be_owned<C: LockTest>(server: &Server) {
        let key = unique_key("pool_deref");
        let mut observer = C::open(server);
        let mut plain = C::open(server);
        let id = plain.backend_id();
        let guard = AdvisoryLock::new(&mut plain, &key).acquire().expect("free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);

        let mutex = std::sync::Mutex::new(plain);
        let guard = AdvisoryLock::new(mutex.lock().expect("not poisoned"), &key).acquire().expect("free");
        assert_held_by(&mut observer, &key, id);
        drop(guard);
        assert_free(&mut observer, &key);
        mutex.lock().expect("not poisoned").advisory_lock(&key).run(|_| Ok::<_, Error>(())).expect("free");

        let mut boxed = Box::new(mutex.into_inner().expect("not poisoned"));
        drop(boxed.advisory_lock(&key).acquire().expect("free"));
        let guard = AdvisoryLock::new(boxed, &key).acquire().expect("free");
        assert_held_by(&mut observer, &key, id);
        drop(guard); // and with it the connection
        wait_until_free(&mut observer, &key);
    }
}

on_every_network_server! {
    fn sessions_that_are_not_what_they_were_are_discarded<C: LockTest>(server: &Server) {
        assert!(!is_kept::<C>(server, |conn, observer, key| {
            let mut guard = AdvisoryLock::new(conn, key).acquire().expect("free");
            kill(observer, guard.backend_id());
            drop(guard);
        }));
        assert!(!is_kept::<C>(server, |conn, observer, key| {
            let mut guard = AdvisoryLock::new(conn, key).acquire().expect("free");
            kill(observer, guard.backend_id());
            guard.release().map(drop).expect_err("it was killed");
        }));
        assert!(!is_kept::<C>(server, |conn, _, key| {
            let mut guard = AdvisoryLock::new(conn, key).acquire().expect("free");
            guard.execute_sql(match C::KIND {
                Kind::Postgres => "SELECT pg_advisory_unlock_all()",
                Kind::Mysql => "DO RELEASE_ALL_LOCKS()",
                Kind::Sqlite => "SELECT dlock_release_all()",
            });
            drop(guard);
        }));
    }

    fn after_its_session_was_killed_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            let mut guard = AdvisoryLock::new(pool.get().expect("a connection"), key).acquire().expect("free");
            kill(observer, guard.backend_id());
            drop(guard);
            let mut conn = pool.get().expect("a connection");
            conn.advisory_lock(key)
                .transaction(|conn| {
                    kill(observer, conn.backend_id());
                    Ok::<_, Error>(())
                })
                .expect_err("it was killed");
        });
    }

    fn after_a_drop_that_could_not_reach_the_server_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        let key = unique_key("pool_cut");
        let proxy = Proxy::start(server);
        let mut observer = C::open(server);
        for size in [1, 3] {
            let pool = pool::<C>(proxy.url(), size);
            let users: Vec<_> = (0..size).map(|_| pool.get().expect("a connection")).collect();
            let mut guards = Vec::new();
            for (n, user) in users.into_iter().enumerate() {
                guards.push(AdvisoryLock::new(user, format!("{key}/{n}")).acquire().expect("free"));
            }
            proxy.cut();
            drop(guards);
            for n in 0..size {
                wait_until_free(&mut observer, format!("{key}/{n}"));
            }
            assert_next_users_are_clean(&pool, &mut observer, &key);
        }
    }

    fn after_a_cancelled_wait_the_next_user_holds_nothing<C: LockTest>(server: &Server) {
        next_user_is_clean::<C>(server, |pool, observer, key| {
            assert!(try_lock(observer, key));
            let mut conn = pool.get().expect("a connection");
            let id = conn.backend_id();
            let waiter = thread::spawn({
                let key = key.to_owned();
                move || matches!(conn.advisory_lock(&key).acquire(), Err(Error::Interrupted { .. }))
            });
            wait_for("the waiter", || observer.is_waiting(id));
            observer.cancel(id);
            assert!(waiter.join().expect("no panic"));
            unlock(observer, key);
        });
    }
}

on_postgres! {
    /// A raw BEGIN is not seen, and in an aborted transaction the server refuses to unlock.
    fn after_a_drop_that_the_server_refused_the_next_user_holds_nothing(server: &Server) {
        next_user_is_clean::<PgConnection>(server, |pool, _, key| {
            let mut guard = AdvisoryLock::new(pool.get().expect("a connection"), key).acquire().expect("free");
            guard.execute_sql("BEGIN");
            guard.batch_execute("SELECT 1 / 0").expect_err("division by zero");
            drop(guard);
        });
    }

    fn after_a_transaction_lock_the_next_user_holds_nothing(server: &Server) {
        next_user_is_clean::<PgConnection>(server, |pool, _, key| {
            let mut conn = pool.get().expect("a connection");
            conn.transaction(|conn| conn.advisory_xact_lock(key).acquire()).expect("a commit");
            conn.transaction(|conn| {
                conn.advisory_xact_lock(key).acquire()?;
                Err::<(), _>(AppError::Own)
            })
            .expect_err("its own");
            conn.transaction(|conn| {
                let mut guard = conn.advisory_lock(key).inside_transaction().acquire()?;
                guard.batch_execute("SELECT 1 / 0")
            })
            .expect_err("division by zero");
        });
    }

    fn a_connection_of_ones_own_takes_locks(server: &Server) {
        own::check(server, own::Wrapper(PgConnection::open(server)));
    }

    fn an_enum_of_connections_is_matched(server: &Server) {
        any::check(server, any::AnyConnection::Postgres(PgConnection::open(server)));
    }
}

on_mysql! {
    fn an_enum_of_connections_is_matched_too(server: &Server) {
        any::check(server, any::AnyConnection::Mysql(MysqlConnection::open(server)));
    }
}

/// A connection of an application: it counts what it sends.
mod own {
    use super::*;
    use diesel::connection::{AnsiTransactionManager, CacheSize, Instrumentation, LoadConnection};
    use diesel::expression::QueryMetadata;
    use diesel::internal::derives::multiconnection::ConnectionSealed;
    use diesel::pg::Pg;
    use diesel::query_builder::{Query, QueryFragment, QueryId};
    use diesel::{ConnectionResult, RunQueryDsl};

    pub(super) struct Wrapper(pub(super) PgConnection);

    impl SimpleConnection for Wrapper {
        fn batch_execute(&mut self, query: &str) -> QueryResult<()> {
            self.0.batch_execute(query)
        }
    }

    impl ConnectionSealed for Wrapper {}

    impl Connection for Wrapper {
        type Backend = Pg;
        type TransactionManager = AnsiTransactionManager;

        fn establish(url: &str) -> ConnectionResult<Self> {
            PgConnection::establish(url).map(Self)
        }

        fn execute_returning_count<T>(&mut self, source: &T) -> QueryResult<usize>
        where
            T: QueryFragment<Pg> + QueryId,
        {
            self.0.execute_returning_count(source)
        }

        fn transaction_state(&mut self) -> &mut AnsiTransactionManager {
            self.0.transaction_state()
        }

        fn instrumentation(&mut self) -> &mut dyn Instrumentation {
            self.0.instrumentation()
        }

        fn set_instrumentation(&mut self, instrumentation: impl Instrumentation) {
            self.0.set_instrumentation(instrumentation);
        }

        fn set_prepared_statement_cache_size(&mut self, size: CacheSize) {
            self.0.set_prepared_statement_cache_size(size);
        }
    }

    impl LoadConnection for Wrapper {
        type Cursor<'conn, 'query> = <PgConnection as LoadConnection>::Cursor<'conn, 'query>;
        type Row<'conn, 'query> = <PgConnection as LoadConnection>::Row<'conn, 'query>;

        fn load<'conn, 'query, T>(
            &'conn mut self,
            source: T,
        ) -> QueryResult<Self::Cursor<'conn, 'query>>
        where
            T: Query + QueryFragment<Pg> + QueryId + 'query,
            Pg: QueryMetadata<T::SqlType>,
        {
            <PgConnection as LoadConnection>::load(&mut self.0, source)
        }
    }

    pub(super) fn check(server: &Server, mut conn: Wrapper) {
        let key = unique_key("pool_own");
        let mut observer = PgConnection::open(server);
        let id = conn.0.backend_id();
        let mut guard = conn
            .advisory_lock(&key)
            .acquire()
            .expect("the lock is free");
        assert_held_by(&mut observer, &key, id);
        diesel::sql_query("SELECT 1")
            .execute(&mut *guard)
            .expect("an answer");
        guard.release().expect("held");
        assert_free(&mut observer, &key);
        conn.advisory_lock(&key)
            .transaction(|conn| {
                assert_held_by(&mut observer, &key, id);
                assert_eq!(depth(conn), 1);
                Ok::<_, Error>(())
            })
            .expect("a commit");
        conn.transaction(|conn| conn.advisory_xact_lock(&key).acquire())
            .expect("a commit");
        assert_clean(&mut conn.0, &mut observer);
        let guard = AdvisoryLock::new(Box::new(conn), &key)
            .acquire()
            .expect("the lock is free");
        kill(&mut observer, id);
        let mut wrapper = None;
        match guard.release() {
            Ok(conn) => wrapper = Some(conn),
            Err(error) => assert!(matches!(error, Error::Lost { .. }), "{error:?}"),
        }
        assert!(wrapper.is_none());
        assert_free(&mut observer, &key);
    }
}

mod any {
    use super::*;

    #[derive(diesel::MultiConnection)]
    pub(super) enum AnyConnection {
        Postgres(PgConnection),
        Mysql(MysqlConnection),
    }

    fn holds<C: LockTest>(server: &Server, conn: &mut C, key: &str) {
        let mut observer = C::open(server);
        let id = conn.backend_id();
        let guard = conn.advisory_lock(key).acquire().expect("the lock is free");
        assert_held_by(&mut observer, key, id);
        drop(guard);
        assert_free(&mut observer, key);
    }

    pub(super) fn check(server: &Server, mut conn: AnyConnection) {
        let key = unique_key("pool_any");
        match &mut conn {
            AnyConnection::Postgres(conn) => holds(server, conn, &key),
            AnyConnection::Mysql(conn) => holds(server, conn, &key),
        }
        // In a transaction of the enum, the variant's own is open.
        conn.transaction(|conn| {
            let result = match conn {
                AnyConnection::Postgres(conn) => conn.advisory_lock(&key).acquire().map(drop),
                AnyConnection::Mysql(conn) => conn.advisory_lock(&key).acquire().map(drop),
            };
            assert!(
                matches!(result, Err(Error::InTransaction { .. })),
                "{result:?}"
            );
            QueryResult::Ok(())
        })
        .expect("a commit");
        assert!(
            !<AnyConnection as Connection>::TransactionManager::is_broken_transaction_manager(
                &mut conn
            )
        );
    }
}
