//! What a long wait writes into the server's log: one ERROR line at the end of its first turn.

use diesel::PgConnection;
use diesel::connection::SimpleConnection;
use dlock_tests::{Server, TestConnection, unique_key, wait_for};
use url::Url;

use crate::support::*;

/// The lines that sessions of a database have written into the server's log.
struct Log {
    conn: PgConnection,
    database: String,
}

impl Log {
    /// `None` if SQL cannot read the log, or cannot tell who wrote a line. The server of this file's own is not like that.
    fn of(server: &Server) -> Option<Self> {
        let mut conn = PgConnection::open(server);
        let readable = "SELECT pg_current_logfile() IS NOT NULL AND current_setting('log_line_prefix') LIKE '%\\%d%'";
        if conn.number(readable) != Some(1) {
            eprintln!(
                "{server}: its log is not looked at. Start it with: -c logging_collector=on -c log_line_prefix='%d|'"
            );
            return None;
        }
        let url = Url::parse(&server.url).expect("the server's URL");
        let database = url.path().trim_start_matches('/').to_owned();
        Some(Self { conn, database })
    }

    /// All lines so far.
    fn lines(&mut self) -> Vec<String> {
        // A line gets there some time after it was written, and one that was written later is behind it.
        let last = unique_key("last");
        let _ = self.conn.batch_execute(&format!("SELECT '{last}'::int"));
        let mut lines = Vec::new();
        wait_for("the server's log", || {
            let log = self.conn.text("SELECT pg_read_file(pg_current_logfile())");
            let log = log.unwrap_or_default();
            lines = log
                .lines()
                .filter(|line| line.contains(&self.database))
                .map(str::to_owned)
                .collect();
            lines.iter().any(|line| line.contains(&last))
        });
        // These are the observer's own.
        lines.retain(|line| !line.contains("last/"));
        lines
    }

    fn errors(&mut self) -> Vec<String> {
        let mut lines = self.lines();
        lines.retain(|line| line.contains("ERROR:"));
        lines
    }
}

/// How many lines a call writes for which nobody had to wait. At other levels than READ COMMITTED the first message of
/// `transaction` fails, because the level is not known.
fn lines_of_a_call(way: Way) -> usize {
    usize::from(way == Way::IsolatedTransaction)
}

#[test]
fn a_wait_of_many_turns_writes_one_error_line() {
    const WAITING: usize = 3;
    on_each_server(45, |server| {
        for_each_way(server, &Way::ALL, |server, way| {
            let Some(mut log) = Log::of(server) else {
                return;
            };
            let key = unique_key("log");
            let mut observer = PgConnection::open(server);
            let holder = holder(server, &key);
            let waiting: Vec<_> = (0..WAITING)
                .map(|_| wait_in_background(server, way, &key, None))
                .collect();
            let first = waiting.iter().map(|session| session.waits(&mut observer));
            let mut turns: Vec<Turn> = first.collect();
            let mut next_turn = || {
                for (session, turn) in waiting.iter().zip(&mut turns) {
                    *turn = session.waits_after(&mut observer, *turn);
                }
            };

            next_turn();
            let after_first = log.lines();
            let errors = log.errors();
            let most = WAITING * (1 + lines_of_a_call(way));
            assert!(errors.len() <= most, "{errors:#?}");

            for _ in 0..3 {
                next_turn();
            }
            assert_eq!(log.lines(), after_first, "quiet turns write nothing");

            drop(holder);
            for session in waiting {
                session.join().expect("the lock");
            }
            assert_eq!(log.lines(), after_first, "nor does the grant");
        });
    });
}

#[test]
fn a_wait_that_ends_in_its_first_turn_writes_nothing() {
    on_each_server(35, |server| {
        for_each_way(server, &Way::ALL, |server, way| {
            let Some(mut log) = Log::of(server) else {
                return;
            };
            let key = unique_key("short");
            let mut observer = PgConnection::open(server);
            let holder = holder(server, &key);
            let session = wait_in_background(server, way, &key, None);
            session.waits(&mut observer);
            drop(holder);
            session.join().expect("the lock");
            let errors = log.errors();
            assert_eq!(errors.len(), lines_of_a_call(way), "{errors:#?}");
        });
    });
}

/// Then a session that holds another lock finds a deadlock in the middle of its turn, and begins the next one.
#[test]
fn an_index_that_the_holder_builds_makes_a_quiet_turn_write_nothing() {
    on_each_server(20, |server| {
        let ways = [Way::Acquire, Way::Transaction, Way::IsolatedTransaction];
        for_each_way(server, &ways, |server, way| {
            let Some(mut log) = Log::of(server) else {
                return;
            };
            let key = unique_key("index");
            let mut observer = PgConnection::open(server);
            observer.execute_sql("CREATE TABLE indexed (n int)");
            let mut holder = holder(server, &key);
            let session = {
                let key = key.clone();
                in_background(way.open(server), move |mut conn| {
                    conn.execute_sql("SELECT pg_advisory_lock(0, 1)");
                    way.with(&mut conn, &key, None, |_| ())
                })
            };
            let first = session.waits(&mut observer);
            let quiet = session.waits_after(&mut observer, first);
            wait_for("the line of the first turn", || {
                log.errors().len() > lines_of_a_call(way)
            });
            holder.execute_sql("SET statement_timeout = '10s'");
            let mut quiet = quiet;
            // On a busy machine the holder may find the deadlock first: its own error, and a line of its own.
            let before = (0..5).find_map(|_| {
                let before = log.lines();
                quiet = session.waits_after(&mut observer, quiet);
                let built = holder.batch_execute("CREATE INDEX CONCURRENTLY i ON indexed (n)");
                if built.is_err() {
                    holder.execute_sql("DROP INDEX i");
                }
                built.ok().map(|()| before)
            });
            session.waits_after(&mut observer, quiet);
            assert_eq!(log.lines(), before.expect("an index"));
            drop(holder);
            session.join().expect("the lock");
        });
    });
}
