//! A holder that is stopped, loses its session, and writes after the next one.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;

use diesel::connection::SimpleConnection;
use diesel::pg::Pg;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, QueryFragment};
use diesel::sql_types::Text;
use dlock_core::{FencingToken, LockKey};
use dlock_diesel::{AdvisoryLockExt, Error};
use dlock_tests::{
    Process, Server, TestConnection, dlock_child, on_every_network_server, on_mysql, on_postgres,
    unique_key,
};
use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;

use crate::both::fencing::{Fenced, Rows, fenced};
use crate::support::*;

fn signal(process: &Process, signal: Signal) {
    let id = Pid::from_raw(process.id().try_into().expect("a process id"));
    send_signal(id, signal).expect("it runs");
}

/// Acquires the lock and writes.
fn write<C: Fenced>(conn: &mut C, key: &str, to: i64) -> QueryResult<(FencingToken, usize)> {
    let mut lock = conn.advisory_lock(key).acquire()?;
    let token = lock.fencing_token()?;
    let written = lock.write(token, to)?;
    lock.release()?;
    Ok((token, written))
}

/// The plan of a statement, in place of its rows.
struct Explain<Q>(Q);

impl<Q> diesel::query_builder::QueryId for Explain<Q> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<Q> diesel::query_builder::Query for Explain<Q> {
    type SqlType = Text;
}

impl<Q: QueryFragment<Pg>> QueryFragment<Pg> for Explain<Q> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("EXPLAIN (COSTS OFF) ");
        self.0.walk_ast(out.reborrow())
    }
}

impl<Q> RunQueryDsl<PgConnection> for Explain<Q> {}

on_postgres! {
    /// And not at all a row of the table, if the lock is not held.
    fn postgresql_asks_for_the_locks_once_for_each_statement_and_before_the_first_row(server: &Server) {
        let rows = Rows::new(server);
        let mut conn = PgConnection::open(rows.server());
        let mut lock = conn.advisory_lock(unique_key("held_plan")).acquire().expect("a free lock");
        let update = diesel::update(fenced::table.filter(fenced::value.ge(0)).filter(lock.held()));
        let plan: Vec<String> = Explain(update.set(fenced::value.eq(1))).load(&mut *lock).expect("a plan");
        let at = |what: &str| plan.iter().position(|line| line.contains(what));
        let once = [at("InitPlan"), at("pg_lock_status"), at("One-Time Filter"), at("Seq Scan on fenced")];
        assert!(once[0].is_some() && once.is_sorted(), "{}", plan.join("\n"));
        assert!(!plan.iter().any(|line| line.contains("SubPlan") || line.contains("Join")), "{}", plan.join("\n"));
    }
}

on_every_network_server! {
    fn a_holder_that_was_stopped_and_lost_its_session_changes_no_row_after_the_next_one<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let key = unique_key("fence_stopped");
        let mut conn = C::open(rows.server());
        for ended in [false, true] {
            let mut holder = Process::spawn(dlock_child!("--url", &rows.server().url, "fence", &key));
            let line = holder.line();
            let id = line.strip_prefix("connected ").and_then(|id| id.parse().ok()).expect("its first line");
            let line = holder.line();
            let token: i64 = line.strip_prefix("acquired ").and_then(|token| token.parse().ok()).expect("a token");
            assert_held_by(&mut conn, LockKey::from(&key), id);
            signal(&holder, Signal::SIGSTOP);
            holder.send("write");
            if ended {
                kill(&mut conn, id);
                let (next, written) = write(&mut conn, &key, 2).expect("the lock is free");
                assert!(next > FencingToken::from(token));
                assert_eq!(written, 1);
            }
            signal(&holder, Signal::SIGCONT);
            // It does not know, and writes.
            holder.expect_line(if ended { "changed 0" } else { "changed 1" });
            holder.expect_line(if ended { "Lost" } else { "drawn" });
            assert!(holder.wait().success());
            let value = conn.number("SELECT value FROM fenced WHERE id = 1");
            assert_eq!(value, Some(if ended { 2 } else { 1 }));
        }
    }
}

on_mysql! {
    /// libmariadb hangs when it executes a kept statement again that was killed after the server had begun to answer. So
    /// it is not sent again.
    fn a_draw_that_is_killed_breaks_the_connection_and_the_next_one_is_not_sent(server: &Server) {
        let mut observer = MysqlConnection::open(server);
        let target = Arc::new(AtomicI64::new(0));
        let drawing = on_connection(MysqlConnection::open(server), {
            let (server, target) = (server.clone(), Arc::clone(&target));
            move |_, _| {
                for _ in 0..20 {
                    let mut conn = MysqlConnection::open(&server);
                    let id = conn.backend_id();
                    let key = unique_key("fence_cancelled");
                    let mut lock = conn.advisory_lock(&key).acquire().expect("a free lock");
                    lock.fencing_token().expect("a token");
                    target.store(id, Ordering::Relaxed);
                    let error = (0..500).find_map(|_| lock.fencing_token().err());
                    let again = error.is_some().then(|| lock.fencing_token());
                    target.store(0, Ordering::Relaxed);
                    match error {
                        // The question whether the session is there may be killed as well.
                        Some(Error::Database(_) | Error::Lost { .. }) => {
                            assert!(matches!(again, Some(Err(Error::Lost { .. }))), "{again:?}");
                            assert!(is_broken(&mut *lock));
                        }
                        None => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        while !drawing.is_finished() {
            match target.load(Ordering::Relaxed) {
                0 => thread::yield_now(),
                // It may have gone.
                id => drop(observer.batch_execute(&format!("KILL QUERY {id}"))),
            }
        }
        drawing.join();
    }
}
