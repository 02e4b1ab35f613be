//! What `check_advisory_locks` finds.

use std::sync::OnceLock;

use dlock_tests::{Server, start_standby_postgres, unique_key};

use crate::both::user::TestUser;
use crate::flavor::*;
use crate::support::*;

/// The topics of what was found, by severity.
fn topics(report: &Report, severity: Severity) -> Vec<&'static str> {
    let findings = report.findings.iter();
    let found = findings.filter(|finding| finding.severity == severity);
    found.map(|finding| finding.topic).collect()
}

/// A standby: of nobody, but PostgreSQL is in recovery all the same.
fn standby() -> &'static Server {
    static STANDBY: OnceLock<Server> = OnceLock::new();
    STANDBY.get_or_init(start_standby_postgres)
}

#[cfg(target_os = "linux")]
fn galera() -> &'static Server {
    static GALERA: OnceLock<Server> = OnceLock::new();
    GALERA.get_or_init(dlock_tests::start_galera_node)
}

#[both]
on_every_server! {
    async fn a_check_names_the_server_in_one_line_and_leaves_nothing<C: LockTest>(server: &Server) {
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        for _ in 0..2 {
            let report = conn.check_advisory_locks().await.expect("a report");
            assert!(report.excludes(), "{report:#}");
            assert!(report.is_well(), "{report:#}");
            assert!(server.name.starts_with(&report.server) || C::KIND == dlock_tests::Kind::Sqlite, "{report}");
            assert_eq!(report.to_string().lines().count(), 1, "{report}");
            assert_holds_nothing(&mut conn, &mut observer).await;
            assert_clean(&mut conn, &mut observer).await;
        }
    }

    async fn a_check_in_a_transaction_is_refused<C: LockTest>(server: &Server) {
        let mut conn = C::open(server).await;
        let checked = conn.transaction(async |conn| {
            let checked = conn.check_advisory_locks().await;
            assert!(matches!(checked, Err(Error::InTransaction { .. })), "{checked:?}");
            diesel::QueryResult::Ok(())
        });
        checked.await.expect("nothing was asked");
    }

    async fn a_check_under_a_guard_leaves_its_lock<C: LockTest>(server: &Server) {
        let key = unique_key("check_guard");
        let mut conn = C::open(server).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let report = lock.check_advisory_locks().await.expect("a report");
        assert!(report.is_well(), "{report:#}");
        assert!(lock.is_held().await.expect("an answer"));
        lock.release().await.expect("it is held");
    }
}

#[both]
on_every_network_server! {
    async fn a_check_on_a_session_that_was_ended_is_lost<C: LockTest>(server: &Server) {
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        kill(&mut observer, id);
        let checked = conn.check_advisory_locks().await;
        assert!(matches!(checked, Err(Error::Lost { .. })), "{checked:?}");
    }

    async fn a_check_tells_what_a_user_without_privileges_is_not_shown<C: LockTest>(server: &Server) {
        let user = TestUser::create(C::observer(server), server, "");
        let mut conn = C::open_url(user.url()).await;
        let report = conn.check_advisory_locks().await.expect("a report");
        assert!(report.is_well(), "{report:#}");
        let notes = topics(&report, Severity::Note);
        let expected: &[&str] = match C::KIND {
            dlock_tests::Kind::Postgres => &["pg_read_all_stats", "pg_signal_backend"],
            _ => &["performance_schema", "PROCESS"],
        };
        for topic in expected {
            assert!(notes.contains(topic), "{topic}: {report:#}");
        }
    }
}

#[both]
on_postgres! {
    async fn a_check_warns_of_limits_that_end_a_holder(server: &Server) {
        let mut conn = PgConnection::open(server).await;
        conn.execute_sql("SET idle_session_timeout = '90s'; SET idle_in_transaction_session_timeout = '1h'").await;
        let report = conn.check_advisory_locks().await.expect("a report");
        assert!(report.excludes() && !report.is_well(), "{report}");
        let warnings = topics(&report, Severity::Warning);
        assert_eq!(warnings, ["idle_session_timeout", "idle_in_transaction_session_timeout"]);
        assert!(report.to_string().contains("90s"), "{report}");
    }

    async fn a_standby_takes_no_lock_and_says_why(_server: &Server) {
        let key = unique_key("standby");
        let mut conn = PgConnection::open(standby()).await;
        let report = conn.check_advisory_locks().await.expect("a report");
        assert_eq!(topics(&report, Severity::Danger), ["standby"], "{report:#}");
        assert!(report.to_string().contains("DO NOT EXCLUDE"), "{report}");

        for _ in 0..2 {
            let error = conn.advisory_lock(&key).acquire().await.map(drop);
            assert_standby(error);
        }
        assert_standby(conn.advisory_lock(&key).try_acquire().await.map(drop));
        let limit = std::time::Duration::from_millis(20);
        assert_standby(conn.advisory_lock(&key).shared().timeout(limit).acquire().await.map(drop));
        let begun = conn.advisory_lock(&key).transaction(async |_conn| Ok::<(), Error>(()));
        assert_standby(begun.await);
        let keys = || [&key, "other"];
        for _ in 0..2 {
            assert_standby(conn.advisory_locks(keys()).acquire().await.map(drop));
        }
        assert_standby(conn.advisory_locks(keys()).try_acquire().await.map(drop));
        let begun = conn.advisory_locks(keys()).transaction(async |_conn| Ok::<(), Error>(()));
        assert_standby(begun.await);
        for _ in 0..2 {
            assert_standby(conn.advisory_semaphore(&key, 2).acquire().await.map(drop));
        }
        assert_standby(conn.advisory_semaphore(&key, 2).try_acquire().await.map(drop));
        let inside = conn.transaction(async |conn| {
            assert_standby(conn.advisory_xact_lock(&key).acquire().await.map(drop));
            assert_standby(conn.advisory_xact_locks(keys()).acquire().await.map(drop));
            diesel::QueryResult::Ok(())
        });
        inside.await.expect("the transaction goes on");
        let inside = conn.transaction(async |conn| {
            let lock = conn.advisory_lock(&key).inside_transaction();
            assert_standby(lock.acquire().await.map(drop));
            let locks = conn.advisory_locks(keys()).inside_transaction();
            assert_standby(locks.acquire().await.map(drop));
            let slot = conn.advisory_semaphore(&key, 2).inside_transaction();
            assert_standby(slot.acquire().await.map(drop));
            diesel::QueryResult::Ok(())
        });
        inside.await.expect("the transaction goes on");
        // A wait in a transaction that Diesel does not know of aborts it, and costs no more.
        conn.execute_sql("BEGIN").await;
        assert_standby(conn.advisory_lock(&key).acquire().await.map(drop));
        conn.execute_sql("ROLLBACK").await;
        assert!(!is_broken(&mut conn));
        assert_eq!(conn.number("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await, Some(0));
    }
}

#[track_caller]
fn assert_standby(result: Result<(), Error>) {
    assert_unsupported(result, "standby");
}

#[track_caller]
fn assert_unsupported(result: Result<(), Error>, why: &str) {
    match result {
        Err(Error::Unsupported { source, .. }) => {
            assert!(source.to_string().contains(why), "{source}");
        }
        other => panic!("{other:?}"),
    }
}

// Group replication with several writers and Percona XtraDB Cluster, as far as a server of `TEST_URLS` is one.
#[both]
on_mysql! {
    async fn a_mysql_takes_locks_unless_it_is_one_of_several_writers(server: &Server) {
        const SEVERAL: &str = "SELECT COUNT(*) FROM performance_schema.global_variables WHERE \
            (VARIABLE_NAME = 'group_replication_single_primary_mode' AND VARIABLE_VALUE = 'OFF') OR \
            (VARIABLE_NAME = 'wsrep_on' AND VARIABLE_VALUE = 'ON')";
        let user = TestUser::create(MysqlConnection::observer(server), server, "");
        let mut conn = MysqlConnection::open_url(user.url()).await;
        let is_mysql = conn.number("SELECT VERSION() NOT LIKE '%MariaDB%'").await == Some(1);
        let several = is_mysql && conn.number(SEVERAL).await != Some(0);
        let judge = |result: Result<(), Error>| match several {
            true => assert_unsupported(result, "several writers"),
            false => result.expect("a free lock"),
        };
        let key = unique_key("several_writers");
        let limit = std::time::Duration::from_millis(20);
        for _ in 0..2 {
            // A dropped guard costs an async connection.
            let mut conn = MysqlConnection::open_url(user.url()).await;
            judge(conn.advisory_lock(&key).acquire().await.map(drop));
            let mut conn = MysqlConnection::open_url(user.url()).await;
            judge(conn.advisory_lock(&key).try_acquire().await.map(drop));
            let mut conn = MysqlConnection::open_url(user.url()).await;
            judge(conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop));
            let mut conn = MysqlConnection::open_url(user.url()).await;
            judge(conn.advisory_locks([&key, "other"]).acquire().await.map(drop));
            let mut conn = MysqlConnection::open_url(user.url()).await;
            judge(conn.advisory_semaphore(&key, 2).acquire().await.map(drop));
        }
        if several {
            let mut conn = MysqlConnection::open_url(user.url()).await;
            let report = conn.check_advisory_locks().await.expect("a report");
            assert_eq!(topics(&report, Severity::Danger), ["cluster"], "{report:#}");
            conn.execute_sql("SET @dlock_one_node = 1").await;
            conn.advisory_lock(&key).acquire().await.expect("a free lock").release().await.expect("it is held");
        }
    }
}

#[both]
on_mysql! {
    #[cfg(target_os = "linux")]
    async fn a_node_of_a_galera_cluster_takes_no_lock_unless_it_is_the_only_one_that_is_used(_server: &Server) {
        let key = unique_key("galera");
        let mut conn = MysqlConnection::open(galera()).await;
        let report = conn.check_advisory_locks().await.expect("a report");
        assert_eq!(topics(&report, Severity::Danger), ["cluster"], "{report:#}");
        for _ in 0..2 {
            assert_unsupported(conn.advisory_lock(&key).acquire().await.map(drop), "Galera");
        }
        assert_unsupported(conn.advisory_lock(&key).try_acquire().await.map(drop), "Galera");
        let limit = std::time::Duration::from_millis(20);
        assert_unsupported(conn.advisory_lock(&key).timeout(limit).acquire().await.map(drop), "Galera");
        let begun = conn.advisory_lock(&key).transaction(async |_conn| Ok::<(), Error>(()));
        assert_unsupported(begun.await, "Galera");
        let keys = || [&key, "other"];
        for _ in 0..2 {
            assert_unsupported(conn.advisory_locks(keys()).acquire().await.map(drop), "Galera");
        }
        assert_unsupported(conn.advisory_locks(keys()).try_acquire().await.map(drop), "Galera");
        for _ in 0..2 {
            assert_unsupported(conn.advisory_semaphore(&key, 2).acquire().await.map(drop), "Galera");
        }
        assert!(!is_broken(&mut conn));

        conn.execute_sql("SET @dlock_one_node = 1").await;
        let mut observer = <MysqlConnection as LockTest>::observer(galera());
        let id = conn.backend_id().await;
        let lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert_held_by(&mut observer, &key, id);
        lock.release().await.expect("it is held");
        assert_free(&mut observer, &key);
        let locks = conn.advisory_locks(keys()).acquire().await.expect("free locks");
        assert_held_by(&mut observer, &key, id);
        locks.release().await.expect("they are held");
        let slot = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
        slot.release().await.expect("it is held");
        assert_free(&mut observer, &key);
    }

    async fn a_check_warns_of_limits_that_end_a_holder_soon(server: &Server) {
        let mut conn = MysqlConnection::open(server).await;
        conn.execute_sql("SET SESSION wait_timeout = 90").await;
        let report = conn.check_advisory_locks().await.expect("a report");
        assert!(report.excludes() && !report.is_well(), "{report}");
        assert_eq!(topics(&report, Severity::Warning), ["wait_timeout"]);
    }
}
