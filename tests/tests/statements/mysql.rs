//! The statement digests of MySQL and MariaDB.

use std::thread;
use std::time::Duration;

use diesel::MysqlConnection;
use diesel_async::AsyncMysqlConnection;
use dlock_diesel_async::AdvisoryLockExt;
use dlock_tests::{AsyncTestConnection, Kind, Server, TestConnection, block_on, servers};

use crate::fresh_database::FreshDatabase;
use crate::other::{make, make_async};
use crate::plan::{Call, Locks, Way, calls};
use crate::{asynchronous, sync};

/// Each call has a key of its own.
const CALLS: usize = 1_000;

/// Those with a `performance_schema`. The MySQL or MariaDB that the tests start has one. MariaDB has none unless it is
/// asked for, and then it counts few statements: it has no digests of prepared ones.
pub(crate) fn counting_servers() -> Vec<&'static Server> {
    let counts = |server: &&Server| {
        let counts = MysqlConnection::open(server).number("SELECT @@performance_schema") == Some(1);
        if !counts {
            eprintln!("{server} does not count statements. Start it with: --performance-schema=ON");
        }
        counts
    };
    let mysql = servers().iter().filter(|server| server.kind == Kind::Mysql);
    let counting: Vec<_> = mysql.filter(counts).collect();
    assert!(
        !counting.is_empty(),
        "no MySQL or MariaDB counts statements: start one with --performance-schema=ON, or unset TEST_URLS"
    );
    counting
}

/// The digests that were seen in a database.
pub(crate) fn digests(server: &Server, database: &str) -> Vec<String> {
    let mut conn = MysqlConnection::open(server);
    conn.execute_sql("SET SESSION group_concat_max_len = 1000000");
    // What Diesel and the drivers send when a connection is opened is not counted.
    let sql = format!(
        "SELECT GROUP_CONCAT(DIGEST_TEXT ORDER BY DIGEST_TEXT SEPARATOR '\\n') \
         FROM performance_schema.events_statements_summary_by_digest WHERE SCHEMA_NAME = '{database}' \
         AND DIGEST_TEXT NOT REGEXP 'SET `(character_set_|time_zone)|max_allowed_packet'"
    );
    let texts = conn.text(&sql).expect("statements were counted");
    texts.lines().map(str::to_owned).collect()
}

/// Each costs the connection.
async fn drop_guards(server: &Server) {
    for call in calls(3 * CALLS..3 * CALLS + 50, Locks::Usual, &[Way::Drop]) {
        let mut conn = AsyncMysqlConnection::open(server).await;
        let guard = conn.advisory_lock(&call.key).acquire().await;
        drop(guard.expect("a free lock"));
    }
}

#[test]
fn a_thousand_locks_add_at_most_40_statement_digests() {
    const SHORT: Duration = Duration::from_millis(5);
    const LONG: Duration = Duration::from_millis(1_500);
    thread::scope(|scope| {
        for server in counting_servers() {
            scope.spawn(move || {
                let fresh = FreshDatabase::<MysqlConnection>::create(server);
                let here = &fresh.server;
                let [first, second] = [0..CALLS / 2, CALLS / 2..CALLS];
                let long_waits =
                    calls(2 * CALLS..2 * CALLS + 24, Locks::Usual, Way::ON_ASYNC_MYSQL);
                let long_waits = long_waits.map(|call| Call {
                    limit: LONG + 31 * call.limit,
                    ..call
                });
                thread::scope(|scope| {
                    scope.spawn(|| {
                        let calls = calls(first, Locks::Usual, Way::ON_MYSQL);
                        make::<MysqlConnection>(here, calls, SHORT, sync::ask_anywhere);
                    });
                    scope.spawn(|| {
                        let calls = calls(second, Locks::Usual, Way::ON_ASYNC_MYSQL);
                        block_on(make_async::<AsyncMysqlConnection>(
                            here,
                            calls,
                            SHORT,
                            asynchronous::ask_anywhere,
                        ));
                    });
                    scope.spawn(|| block_on(drop_guards(here)));
                    for (number, call) in long_waits.enumerate() {
                        let call = [call].into_iter();
                        scope.spawn(move || match number % 2 {
                            0 => make::<MysqlConnection>(here, call, LONG, sync::ask_anywhere),
                            _ => block_on(make_async::<AsyncMysqlConnection>(
                                here,
                                call,
                                LONG,
                                asynchronous::ask_anywhere,
                            )),
                        });
                    }
                });
                let database = here.url.rsplit('/').next().expect("a database");
                let digests = digests(server, database);
                eprintln!("{}: {} digests", server.name, digests.len());
                assert!(digests.len() <= 40, "{server}:\n{}", digests.join("\n"));
            });
        }
    });
}
