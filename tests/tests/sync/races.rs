//! Races: the server grants a lock at the moment at which the wait for it ends. Whichever comes first, no session then
//! holds a lock that its caller does not know of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diesel::connection::TransactionManager;
use diesel::{Connection, MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    PATIENCE, Server, number_from_environment, on_every_network_server, on_every_server, on_mysql,
    on_postgres, unique_key,
};

use crate::support::*;

/// How long each kind of race is run for, on each server, unless `DLOCK_RACES` is the number of rounds.
const RUN: Duration = Duration::from_secs(1);

/// A delay that moves towards the moment at which either outcome is as likely.
struct Aim {
    delay: Duration,
    step: Duration,
}

impl Aim {
    fn earlier(&mut self) {
        self.delay = self.delay.saturating_sub(self.step);
    }

    fn later(&mut self) {
        self.delay += self.step;
    }

    /// Waits, without giving the processor away.
    fn wait(&self, since: Instant) {
        while since.elapsed() < self.delay {
            std::hint::spin_loop();
        }
    }
}

/// How a session asks for the lock and what it does once it has it: `held` while it is sure to have it.
type Ask<C> = fn(&mut C, key: &str, held: &dyn Fn()) -> Result<(), Error>;

/// What ends the wait, besides the release.
#[derive(Clone, Copy, PartialEq)]
enum Against {
    /// The limit of the wait itself.
    Limit,
    /// A cancel, sent by a third session.
    Cancel,
}

/// Runs rounds in which the holder releases the lock just as the wait ends.
fn race<C: LockTest>(
    server: &'static Server,
    name: &str,
    against: Against,
    setup: &'static str,
    ask: Ask<C>,
) {
    let key = unique_key(name);
    let (mut holder, mut observer) = (C::open(server), C::open(server));
    // When the waiter began to ask, in microseconds since `epoch`.
    let epoch = Instant::now();
    let began = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let waiter_id = Arc::new(AtomicI64::new(0));
    let waiter = in_background(server, {
        let (key, began, ended, id) = (
            key.clone(),
            Arc::clone(&began),
            Arc::clone(&ended),
            Arc::clone(&waiter_id),
        );
        move |mut conn: C, stage| {
            loop {
                if id.load(Ordering::SeqCst) == 0 {
                    if !setup.is_empty() {
                        conn.execute_sql(setup);
                    }
                    id.store(conn.backend_id(), Ordering::SeqCst);
                }
                stage.say("ready");
                stage.pause();
                if began.load(Ordering::SeqCst) == u64::MAX {
                    return;
                }
                began.store(epoch.elapsed().as_micros() as u64, Ordering::SeqCst);
                let result = ask(&mut conn, &key, &|| {
                    ended.store(true, Ordering::SeqCst);
                    stage.say("acquired");
                    stage.pause();
                });
                ended.store(true, Ordering::SeqCst);
                let broken = C::TransactionManager::is_broken_transaction_manager(&mut conn);
                stage.say(match result {
                    Ok(()) => "released".to_owned(),
                    Err(Error::Timeout { .. }) => "timed out".to_owned(),
                    // A cancel may come after the grant, or hit the statements around the wait.
                    Err(error @ (Error::Interrupted { .. } | Error::Database(_))) if broken => {
                        let message = error.to_string();
                        format!("broken: {}", message.replace(&key, ".."))
                    }
                    Err(Error::Interrupted { .. }) => "interrupted".to_owned(),
                    Err(Error::Database(error)) => format!("failed: {error}"),
                    Err(error) => format!("refused: {error}"),
                });
                stage.pause();
                if broken {
                    // As a pool does.
                    conn = C::open(server);
                    id.store(0, Ordering::SeqCst);
                }
            }
        }
    });
    // A third session, to cancel at the same time as the holder releases.
    let canceller = in_background(server, {
        let id = Arc::clone(&waiter_id);
        move |mut conn: C, stage| {
            loop {
                stage.say("ready");
                stage.pause();
                let id = id.load(Ordering::SeqCst);
                if !conn.is_connected(id) {
                    return;
                }
                conn.cancel(id);
                stage.say("cancelled");
            }
        }
    });

    let mut outcomes = BTreeMap::<String, u32>::new();
    let mut aim = Aim {
        delay: Duration::from_millis(4),
        step: Duration::from_micros(60),
    };
    let started = Instant::now();
    let (wanted, mut rounds) = (number_from_environment::<u32>("DLOCK_RACES"), 0);
    let is_enough = |rounds| match wanted {
        Some(wanted) => rounds >= wanted,
        None => started.elapsed() >= RUN,
    };
    // On a busy machine it takes more rounds to find the aim.
    while !is_enough(rounds) || outcomes.len() < 2 && started.elapsed() < PATIENCE {
        waiter.says("ready");
        let lock = holder.advisory_lock(&key).acquire().expect("a free lock");
        let id = waiter_id.load(Ordering::SeqCst);
        began.store(0, Ordering::SeqCst);
        ended.store(false, Ordering::SeqCst);
        waiter.go_on();
        while began.load(Ordering::SeqCst) == 0 {
            std::hint::spin_loop();
        }
        let since = epoch + Duration::from_micros(began.load(Ordering::SeqCst));
        if against == Against::Cancel {
            canceller.says("ready");
            // MySQL keeps a cancel that came too late for the next statement.
            while !(observer.is_waiting(id) || ended.load(Ordering::SeqCst)) {
                assert!(since.elapsed() < PATIENCE, "it does not wait");
            }
            // Either may come first: the aim is the delay of the release after the cancel.
            canceller.go_on();
            Aim {
                delay: since.elapsed() + aim.delay.saturating_sub(Duration::from_millis(4)),
                ..aim
            }
            .wait(since);
        } else {
            aim.wait(since);
        }
        lock.release().expect("a release");

        let mut outcome = waiter.hear();
        if against == Against::Cancel {
            canceller.says("cancelled");
        }
        if outcome == "acquired" {
            assert_eq!(
                holders(&mut observer, &key),
                [id],
                "it says that it holds the lock"
            );
            waiter.go_on();
            let after = waiter.hear();
            if after != "released" {
                outcome = format!("acquired, then {after}");
            }
            aim.later();
        } else {
            aim.earlier();
        }
        assert!(!outcome.starts_with("refused"), "{outcome}");
        // The server ends a session in its own time.
        let nobody = |observer: &mut C| holders(observer, &key).is_empty();
        if outcome.starts_with("broken") {
            dlock_tests::wait_for("the end of the broken session", || nobody(&mut observer));
        }
        assert!(nobody(&mut observer), "it is held after {outcome}");
        let broken = outcome.starts_with("broken");
        assert!(
            broken || observer.is_connected(id),
            "its session is ended after {outcome}"
        );
        *outcomes.entry(outcome).or_default() += 1;
        rounds += 1;
        waiter.go_on();
    }
    waiter.says("ready");
    began.store(u64::MAX, Ordering::SeqCst);
    waiter.go_on();
    waiter.join();
    let id = waiter_id.load(Ordering::SeqCst);
    dlock_tests::wait_for("the end of the session", || !observer.is_connected(id));
    canceller.says("ready");
    canceller.go_on();
    canceller.join();
    assert_free(&mut observer, &key);
    eprintln!(
        "{name} on {}: {rounds} rounds, no stray hold: {outcomes:?}",
        server.name
    );
    assert!(
        rounds >= 10 && outcomes.len() >= 2,
        "both outcomes in {rounds} rounds: {outcomes:?}"
    );
}

const LIMIT: Duration = Duration::from_millis(4);

on_every_server! {
    fn a_limit_that_passes_as_the_lock_is_granted<C: LockTest>(server: &'static Server) {
        race::<C>(server, "limit", Against::Limit, "", |conn, key, held| {
            let lock = conn.advisory_lock(key).timeout(LIMIT).acquire()?;
            held();
            lock.release()?;
            Ok(())
        });
    }
}

on_every_network_server! {
    fn a_cancel_that_comes_as_the_lock_is_granted<C: LockTest>(server: &'static Server) {
        race::<C>(server, "cancel", Against::Cancel, "", |conn, key, held| {
            let lock = conn.advisory_lock(key).acquire()?;
            held();
            lock.release()?;
            Ok(())
        });
    }

    fn a_cancel_of_a_wait_with_a_limit_that_comes_as_the_lock_is_granted<C: LockTest>(server: &'static Server) {
        race::<C>(server, "cancel_limit", Against::Cancel, "", |conn, key, held| {
            let lock = conn.advisory_lock(key).timeout(Duration::from_secs(60)).acquire()?;
            held();
            lock.release()?;
            Ok(())
        });
    }
}

on_postgres! {
    fn a_limit_that_passes_inside_a_transaction_as_the_lock_is_granted(server: &'static Server) {
        race::<PgConnection>(server, "limit_inside", Against::Limit, "", |conn, key, held| {
            conn.transaction(|conn| {
                let lock = conn.advisory_lock(key).inside_transaction().timeout(LIMIT).acquire()?;
                held();
                lock.release()?;
                Ok(())
            })
        });
    }

    fn a_cancel_that_comes_as_a_transaction_is_granted_its_lock(server: &'static Server) {
        race::<PgConnection>(server, "cancel_transaction", Against::Cancel, "", |conn, key, held| {
            conn.advisory_lock(key).transaction(|_| {
                held();
                Ok(())
            })
        });
    }

    fn a_cancel_that_comes_as_a_serializable_transaction_is_granted_its_lock(server: &'static Server) {
        let serializable = "SET default_transaction_isolation = 'serializable'";
        race::<PgConnection>(server, "cancel_serializable", Against::Cancel, serializable, |conn, key, held| {
            conn.advisory_lock(key).transaction(|_| {
                held();
                Ok(())
            })
        });
    }
}

on_mysql! {
    fn a_limit_that_passes_under_a_cap_as_the_lock_is_granted(server: &'static Server) {
        let cap = "SET @unused = 1 /*M! , SESSION max_statement_time = 50 */ /*!80000 , SESSION max_execution_time = 50000 */";
        race::<MysqlConnection>(server, "limit_capped", Against::Limit, cap, |conn, key, held| {
            let lock = conn.advisory_lock(key).timeout(LIMIT).acquire()?;
            held();
            lock.release()?;
            Ok(())
        });
    }
}
