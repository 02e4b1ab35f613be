//! What the other tests stand on.

use std::{panic::catch_unwind, sync::mpsc::channel, thread, time::Duration};

use diesel::{MysqlConnection, PgConnection, RunQueryDsl, sql_query};
use dlock_tests::{
    Kind, PATIENCE, Process, Proxy, Server, TestConnection, dlock_child, on_every_network_server,
    on_mysql, on_postgres, servers, servers_from, unique_key, wait_for, wait_for_within,
};

on_every_network_server! {
    fn answers<C: TestConnection>(server: &Server) {
        assert_eq!(server.kind, C::KIND);
        assert!(server.version() >= (8, 0), "{server}");
        let mut conn = C::open(server);
        assert_eq!(conn.number("SELECT 1"), Some(1));
        assert_eq!(conn.number("SELECT NULL"), None);
        assert_eq!(conn.text("SELECT 'ä'"), Some("ä".to_owned()));
    }

    fn sees_kills_and_cancels_other_sessions<C: TestConnection>(server: &'static Server) {
        let mut observer = C::open(server);
        let mut victim = C::open(server);
        let id = victim.backend_id();
        assert_ne!(id, observer.backend_id());
        assert!(observer.is_connected(id) && !observer.is_waiting(id));

        let statement = match server.kind {
            Kind::Postgres => "SELECT pg_sleep(600)",
            Kind::Mysql => "DO SLEEP(600)",
            Kind::Sqlite => unreachable!("BUG: it is no server"),
        };
        let asleep = match server.kind {
            Kind::Postgres => format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {id} AND wait_event = 'PgSleep'"),
            Kind::Mysql => format!("SELECT count(*) FROM information_schema.processlist WHERE id = {id} AND state = 'User sleep'"),
            Kind::Sqlite => unreachable!("BUG: it is no server"),
        };
        let (awake, first_sleep) = channel();
        let sleeper = thread::spawn(move || {
            // MySQL's SLEEP() returns when it is interrupted, PostgreSQL's raises an error.
            let _ = victim.batch_execute(statement);
            awake.send(victim.number("SELECT 1")).expect("the test waits");
            victim.batch_execute(statement).expect_err("killed");
        });
        wait_for("the first sleep", || observer.number(&asleep) == Some(1));
        observer.cancel(id);
        assert_eq!(first_sleep.recv_timeout(PATIENCE), Ok(Some(1)), "the first sleep ends, the session goes on");
        wait_for("the second sleep", || observer.number(&asleep) == Some(1));
        observer.kill(id);
        wait_for("the end of the session", || !observer.is_connected(id));
        sleeper.join().expect("the sleeper's assertions");
    }

    fn sees_who_waits_for_a_lock<C: TestConnection>(server: &'static Server) {
        let key = unique_key("sees_who_waits");
        let lock = match server.kind {
            Kind::Postgres => format!("SELECT pg_advisory_lock(hashtext('{key}'))"),
            Kind::Mysql => format!("DO GET_LOCK('{key}', 600)"),
            Kind::Sqlite => unreachable!("BUG: it is no server"),
        };
        let mut observer = C::open(server);
        let mut holder = C::open(server);
        let mut waiter = C::open(server);
        let (holder_id, waiter_id) = (holder.backend_id(), waiter.backend_id());
        holder.execute_sql(&lock);
        assert!(!observer.is_waiting(holder_id));
        let thread = thread::spawn(move || waiter.execute_sql(&lock));
        wait_for("the second one to wait", || observer.is_waiting(waiter_id));
        assert!(!observer.is_waiting(holder_id));
        drop(holder);
        thread.join().expect("the lock is granted");
    }

    fn proxy_counts_round_trips<C: TestConnection>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        assert_eq!(proxy.connections(), 1);
        assert!(proxy.round_trips() > 0, "opening takes round trips");
        proxy.reset();
        for count in 1..=50 {
            conn.execute_sql("SELECT 1");
            assert_eq!(proxy.round_trips(), count * batch(server));
        }
        drop(conn);
        assert_eq!(proxy.round_trips(), 50 * batch(server), "saying goodbye takes none");
    }

    fn proxy_cuts_connections_but_lets_new_ones_in<C: TestConnection>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut observer = C::open(server);
        let mut conn = C::open_url(proxy.url());
        let id = conn.backend_id();
        proxy.cut();
        conn.batch_execute("SELECT 1").expect_err("the connection is cut");
        wait_for("the server to notice", || !observer.is_connected(id));
        C::open_url(proxy.url()).execute_sql("SELECT 1");
    }

    fn proxy_holds_answers_back<C: TestConnection>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        conn.execute_sql("SELECT 1");
        proxy.reset();
        proxy.pause();
        let thread = thread::spawn(move || conn.execute_sql("SELECT 1"));
        thread::sleep(Duration::from_millis(200));
        assert!(!thread.is_finished());
        assert_eq!(proxy.round_trips(), 0);
        proxy.resume();
        thread.join().expect("the answer");
        assert_eq!(proxy.round_trips(), batch(server));
    }

    fn cutting_ends_a_pause<C: TestConnection>(server: &Server) {
        let proxy = Proxy::start(server);
        let mut conn = C::open_url(proxy.url());
        proxy.pause();
        let thread = thread::spawn(move || conn.batch_execute("SELECT 1").expect_err("the connection is cut"));
        thread::sleep(Duration::from_millis(50));
        proxy.cut();
        thread.join().expect("an error");
    }

    fn a_killed_process_loses_its_connection<C: TestConnection>(server: &Server) {
        let mut observer = C::open(server);
        let mut process = Process::spawn(dlock_child!["--url", &server.url, "connect"]);
        let line = process.line();
        let id = line.strip_prefix("connected ").expect("its role").parse().expect("a number");
        assert!(observer.is_connected(id));
        process.kill9();
        wait_for("the server to notice", || !observer.is_connected(id));
    }

    fn a_process_ends_when_told_to<C: TestConnection>(server: &Server) {
        let mut process = Process::spawn(dlock_child!["--url", &server.url, "connect"]);
        process.line();
        assert!(process.is_silent_for(Duration::from_millis(20)));
        process.send("go on");
        assert!(process.wait().success());
    }
}

on_postgres! {
    fn postgres_has_a_macro_of_its_own(server: &Server) {
        let mut conn = PgConnection::open(server);
        assert_eq!(conn.number("SELECT true"), Some(1));
        assert!(conn.text("SELECT version()").expect("a version").starts_with("PostgreSQL"));
    }
}

on_mysql! {
    fn mysql_has_a_macro_of_its_own(server: &Server) {
        let version = MysqlConnection::open(server).text("SELECT VERSION()").expect("a version");
        assert_eq!(version.contains("MariaDB"), server.is_mariadb(), "{version}");
    }

    /// `COM_STMT_CLOSE` has no answer.
    fn proxy_does_not_count_what_is_never_answered(server: &Server) {
        let proxy = Proxy::start(server);
        let mut conn = MysqlConnection::open_url(proxy.url());
        proxy.reset();
        for count in 1..=20 {
            // Prepare, execute, close.
            sql_query("DO 1").execute(&mut conn).expect("the query");
            assert_eq!(proxy.round_trips(), 2 * count);
        }
    }
}

/// The round trips of Diesel's `batch_execute`, which on MySQL allows several statements before and forbids them after.
fn batch(server: &Server) -> u64 {
    match server.kind {
        Kind::Postgres => 1,
        Kind::Mysql => 3,
        Kind::Sqlite => unreachable!("BUG: it is no server"),
    }
}

#[test]
fn there_is_a_server_of_each_kind() {
    for kind in [Kind::Postgres, Kind::Mysql] {
        assert!(servers().iter().any(|server| server.kind == kind), "{kind}");
    }
}

#[test]
fn bad_urls_are_named_together_with_the_remedy() {
    for (urls, expected) in [
        ("", "names no server"),
        ("  ", "names no server"),
        ("sqlite://x", "scheme \"sqlite\" is unknown"),
        ("127.0.0.1:5432", "no URL"),
        ("postgres:///test", "names no host"),
        ("postgres://test:secret@127.0.0.1:1/test", "docker compose"),
        (
            "postgres://test:secret@127.0.0.1:1/test",
            "postgres://test:***@127.0.0.1:1/test",
        ),
        ("mysql://test:secret@127.0.0.1:1/test", "tests/run"),
        (
            "mariadb://test:secret@127.0.0.1:1/test",
            "mysql://test:***@127.0.0.1:1/test",
        ),
        ("postgres://test:secret@[bad/test", "test:***@[bad/test"),
    ] {
        let message = servers_from(urls).expect_err(urls);
        assert!(message.contains(expected), "{urls:?}: {message}");
        assert!(!message.contains("secret"), "{urls:?}: {message}");
    }
}

#[test]
fn a_list_may_name_servers_more_than_once_and_of_one_kind() {
    let server = &servers()[0];
    let twice = servers_from(&format!(" {0}  {0}\n", server.url)).expect("two servers");
    assert_eq!(
        twice.iter().map(|server| &server.name).collect::<Vec<_>>(),
        [&server.name; 2]
    );
}

#[test]
fn a_failure_names_the_server() {
    fn fails(server: &'static Server) {
        panic!("as asked, on {}", server.name);
    }
    let payload = catch_unwind(|| dlock_tests::run_on_every_network_server(fails, fails))
        .expect_err("a failure");
    let message = payload.downcast_ref::<String>().expect("a message");
    for server in servers() {
        assert!(message.contains(&server.name), "{message}");
    }
}

#[test]
#[should_panic(expected = "waited 0.05 s in vain for the moon")]
fn wait_for_names_what_did_not_come() {
    wait_for_within(Duration::from_millis(50), "the moon", || false);
}

#[test]
fn keys_are_unique() {
    assert_ne!(unique_key("keys"), unique_key("keys"));
}
