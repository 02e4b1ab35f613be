//! Fencing tokens, and the condition that is true only in the session that holds the lock.

use diesel::QueryResult;
use diesel::dsl::not;
use diesel::prelude::{BoolExpressionMethods, ExpressionMethods, QueryDsl};
use dlock_core::{FencingToken, LockKey};
use dlock_tests::{Kind, Server, unique_key};

use crate::both::fresh_database::FreshDatabase;
use crate::both::round_trips::Counted;
use crate::flavor::*;
use crate::support::*;

diesel::table! {
    /// Rows that remember the token of the last write.
    fenced (id) {
        id -> Integer,
        value -> BigInt,
        fence -> BigInt,
    }
}

/// A database of its own with two rows of [`fenced`].
pub(crate) enum Rows {
    Postgres(FreshDatabase<diesel::PgConnection>),
    Mysql(FreshDatabase<diesel::MysqlConnection>),
    Sqlite(FreshDatabase<diesel::SqliteConnection>),
}

impl Rows {
    pub(crate) fn new(server: &Server) -> Self {
        let rows = match server.kind {
            Kind::Postgres => Self::Postgres(FreshDatabase::create(server)),
            Kind::Mysql => Self::Mysql(FreshDatabase::create(server)),
            Kind::Sqlite => Self::Sqlite(FreshDatabase::create(server)),
        };
        let sql = [
            "CREATE TABLE fenced (id INTEGER PRIMARY KEY, value BIGINT NOT NULL, fence BIGINT NOT NULL)",
            "INSERT INTO fenced VALUES (1, 0, 0), (2, 0, 0)",
        ];
        fn execute<C: dlock_tests::TestConnection>(server: &Server, sql: [&str; 2]) {
            let mut conn = C::open(server);
            for sql in sql {
                conn.execute_sql(sql);
            }
        }
        match server.kind {
            Kind::Postgres => execute::<diesel::PgConnection>(rows.server(), sql),
            Kind::Mysql => execute::<diesel::MysqlConnection>(rows.server(), sql),
            Kind::Sqlite => execute::<diesel::SqliteConnection>(rows.server(), sql),
        }
        rows
    }

    pub(crate) fn server(&self) -> &Server {
        match self {
            Self::Postgres(database) => &database.server,
            Self::Mysql(database) => &database.server,
            Self::Sqlite(database) => &database.server,
        }
    }
}

/// What an application does with Diesel.
#[both]
pub(crate) trait Fenced: LockTest {
    /// The recipe of the guide.
    async fn write(&mut self, token: FencingToken, to: i64) -> QueryResult<usize>;

    async fn write_if_held(&mut self, held: Held<Self::Backend>, to: i64) -> QueryResult<usize>;

    /// The condition as a column, twice in a statement, beside others, negated, and in a boxed query.
    async fn truths(&mut self, held: Held<Self::Backend>) -> QueryResult<Vec<bool>>;

    async fn delete_if_held(&mut self, held: Held<Self::Backend>) -> QueryResult<usize>;

    async fn count_if_held(&mut self, held: Held<Self::Backend>) -> QueryResult<i64>;
}

macro_rules! fenced {
    ($($Conn:ident)*) => {$(
        #[both]
        impl Fenced for $Conn {
            async fn write(&mut self, token: FencingToken, to: i64) -> QueryResult<usize> {
                let token = i64::from(token);
                diesel::update(fenced::table.find(1).filter(fenced::fence.lt(token)))
                    .set((fenced::value.eq(to), fenced::fence.eq(token)))
                    .execute(self)
                    .await
            }

            async fn write_if_held(&mut self, held: Held<Self::Backend>, to: i64) -> QueryResult<usize> {
                diesel::update(fenced::table.filter(held))
                    .set(fenced::value.eq(to))
                    .execute(self)
                    .await
            }

            async fn truths(&mut self, held: Held<Self::Backend>) -> QueryResult<Vec<bool>> {
                let (both, neither) = (held.clone().and(held.clone()), not(held.clone()));
                let selected = diesel::select((held.clone(), both, neither));
                let (one, two, three): (bool, bool, bool) = selected.get_result(self).await?;
                let rows = fenced::table.filter(fenced::id.gt(0).and(held.clone())).count();
                let rows: i64 = rows.get_result(self).await?;
                let boxed = fenced::table.filter(fenced::id.eq(2)).into_boxed();
                let boxed: Vec<i32> = boxed.filter(held).select(fenced::id).load(self).await?;
                Ok(vec![one, two, !three, rows == 2, boxed == [2]])
            }

            async fn delete_if_held(&mut self, held: Held<Self::Backend>) -> QueryResult<usize> {
                diesel::delete(fenced::table.filter(held)).execute(self).await
            }

            async fn count_if_held(&mut self, held: Held<Self::Backend>) -> QueryResult<i64> {
                fenced::table.filter(held).count().get_result(self).await
            }
        }
    )*};
}

fenced! { PgConnection MysqlConnection SqliteConnection }

#[both]
on_every_server! {
    async fn tokens_rise_from_draw_to_draw_and_from_holder_to_holder<C: LockTest>(server: &Server) {
        let keys = [unique_key("fence"), unique_key("fence")];
        let mut conns = [C::open(server).await, C::open(server).await];
        let mut drawn = Vec::new();
        for round in 0..12 {
            let conn = &mut conns[round % 2];
            let mut lock = conn.advisory_lock(&keys[round / 2 % 2]).acquire().await.expect("a free lock");
            for _ in 0..2 {
                drawn.push(lock.fencing_token().await.expect("a token"));
            }
            lock.release().await.expect("a release");
        }
        assert!(drawn.is_sorted_by(|one, next| one < next), "{drawn:?}");
        assert!(i64::from(drawn[0]) > 0);
        if C::KIND == Kind::Mysql {
            assert!(i64::from(drawn[0]) < 1 << 56, "it has a server_id");
        }
        assert!(drawn.iter().all(|token| FencingToken::from(i64::from(*token)) == *token));
        for conn in &mut conns {
            assert_clean(conn, &mut C::observer(server)).await;
        }
    }

    /// Each row is two holders at once. Each of them draws before and after the other.
    async fn tokens_of_different_locks_rise_too_in_transactions_that_have_written<C: LockTest>(server: &Server) {
        let tables = [Table::new(server), Table::new(server)];
        let (mut a, mut b) = (C::open(server).await, C::open(server).await);
        let keys = [unique_key("fence_in"), unique_key("fence_in")];
        let writes = C::KIND != Kind::Sqlite;
        begin(&mut a).await;
        if writes {
            a.execute_sql(&tables[0].insert(1)).await;
        }
        let lock = a.advisory_lock(&keys[0]).inside_transaction().acquire().await;
        let mut lock = lock.expect("a free lock");
        let mut drawn = vec![lock.fencing_token().await.expect("a token")];
        let mut other = b.advisory_lock(&keys[1]).acquire().await.expect("a free lock");
        begin(&mut *other).await;
        if writes {
            other.execute_sql(&tables[1].insert(1)).await;
        }
        for savepoint in [false, true] {
            drawn.push(other.fencing_token().await.expect("a token"));
            if savepoint {
                begin(&mut *lock).await;
            }
            drawn.push(lock.fencing_token().await.expect("a token"));
        }
        assert!(drawn.is_sorted_by(|one, next| one < next), "{drawn:?}");
        roll_back(&mut *lock).await;
        lock.release().await.expect("a release");
        commit(&mut *other).await;
        other.release().await.expect("a release");
        roll_back(&mut a).await;
        let mut lock = a.advisory_lock(&keys[1]).acquire().await.expect("a free lock");
        assert!(Some(&lock.fencing_token().await.expect("a token")) > drawn.last(), "it was rolled back");
        lock.release().await.expect("a release");
        assert_clean(&mut a, &mut C::observer(server)).await;
        assert_clean(&mut b, &mut C::observer(server)).await;
    }

    async fn an_owned_lock_and_one_in_a_test_transaction_have_tokens<C: LockTest>(server: &Server) {
        let key = unique_key("fence_owned");
        let conn = Box::new(C::open(server).await);
        let mut lock = AdvisoryLock::new(conn, &key).acquire().await.expect("a free lock");
        let first = lock.fencing_token().await.expect("a token");
        let mut conn = lock.release().await.expect("a release");
        conn.begin_test_transaction().await.expect("it begins");
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        assert!(lock.fencing_token().await.expect("a token") > first);
        lock.release().await.expect("a release");
        assert_eq!((depth(&mut *conn), is_broken(&mut *conn)), (1, false));
    }

    /// Also where it is another session's by now: the check is the same statement.
    async fn a_lost_lock_has_no_token<C: LockTest>(server: &Server) {
        let key = unique_key("fence_lost");
        let mut next = C::observer(server);
        for taken_by_another in [false, true] {
            let mut conn = C::open(server).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.execute_sql(C::RELEASE_ALL).await;
            if taken_by_another {
                assert!(try_lock(&mut next, &key));
            }
            match lock.fencing_token().await {
                Err(Error::NotHeld { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert!(is_broken(&mut *lock), "it is not the session that it was");
            drop(lock);
            if taken_by_another {
                unlock(&mut next, &key);
            }
        }
        wait_until_free(&mut next, &key);
    }

    async fn the_condition_is_true_only_in_the_session_that_holds_the_lock<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let keys = [unique_key("held"), unique_key("held")];
        let (mut conn, mut other) = (C::open(rows.server()).await, C::open(rows.server()).await);
        let mut lock = conn.advisory_lock(&keys[0]).acquire().await.expect("a free lock");
        let mut others = other.advisory_lock(&keys[1]).acquire().await.expect("a free lock");
        for (held, here) in [(lock.held(), true), (others.held(), false)] {
            assert_eq!(lock.truths(held.clone()).await.expect("truths"), [here; 5]);
            assert_eq!(others.truths(held.clone()).await.expect("truths"), [!here; 5]);
            // It owns its values, so the connection is free to be used.
            assert_eq!(lock.write_if_held(held.clone(), 7).await.expect("a write"), if here { 2 } else { 0 });
        }
        let held = lock.held();
        assert_eq!(others.delete_if_held(held.clone()).await.expect("a statement"), 0);
        lock.release().await.expect("a release");
        assert_eq!(conn.truths(held.clone()).await.expect("truths"), [false; 5]);
        assert_eq!(conn.write_if_held(held.clone(), 8).await.expect("a statement"), 0);
        let next = conn.advisory_lock(&keys[0]).acquire().await.expect("a free lock");
        let held = next.held();
        next.release().await.expect("a release");
        others.release().await.expect("a release");
        let mut lock = other.advisory_lock(&keys[0]).acquire().await.expect("a free lock");
        assert_eq!(conn.delete_if_held(held).await.expect("a statement"), 0, "it is another session's now");
        let held = lock.held();
        assert_eq!(lock.delete_if_held(held).await.expect("a statement"), 2);
        lock.release().await.expect("a release");
        assert_clean(&mut conn, &mut C::observer(rows.server())).await;
    }

    async fn a_statement_under_a_lost_lock_changes_nothing<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let key = unique_key("held_lost");
        let (mut conn, mut next) = (C::open(rows.server()).await, C::observer(rows.server()));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let held = lock.held();
        assert_eq!(lock.write_if_held(held, 1).await.expect("a statement"), 2);
        lock.execute_sql(C::RELEASE_ALL).await;
        let held = lock.held();
        assert_eq!(lock.write_if_held(held.clone(), 2).await.expect("a statement"), 0);
        assert!(try_lock(&mut next, &key));
        assert_eq!(lock.write_if_held(held, 3).await.expect("a statement"), 0);
        drop(lock);
        unlock(&mut next, &key);
    }

    /// Whichever of them was lost.
    async fn several_locks_have_a_token_and_a_condition_while_all_are_held<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let number = i64::from(std::process::id()) << 21;
        let keys: [LockKey; 3] = [unique_key("fence_all").into(), (-number).into(), (std::process::id() as i32, -3).into()];
        let mut other = C::open(rows.server()).await;
        for lost in 0..keys.len() {
            let mut conn = C::open(rows.server()).await;
            let mut lock = conn.advisory_locks(&keys).acquire().await.expect("free locks");
            let token = lock.fencing_token().await.expect("a token");
            assert!(lock.fencing_token().await.expect("a token") > token);
            let held = lock.held();
            assert_eq!(lock.truths(held.clone()).await.expect("truths"), [true; 5]);
            assert_eq!(other.truths(held.clone()).await.expect("truths"), [false; 5]);
            assert_eq!(lock.write_if_held(held.clone(), 1).await.expect("a write"), 2);
            let name = literal(C::KIND, &keys[lost]);
            lock.execute_sql(&match C::KIND {
                Kind::Postgres => format!("SELECT pg_advisory_unlock({name})"),
                Kind::Mysql => format!("DO RELEASE_LOCK({name})"),
                // Nothing else releases a single one.
                Kind::Sqlite => C::RELEASE_ALL.to_owned(),
            }).await;
            assert_eq!(lock.truths(held.clone()).await.expect("truths"), [false; 5], "without {}", keys[lost]);
            assert_eq!(lock.write_if_held(held, 2).await.expect("a statement"), 0);
            let refused = lock.fencing_token().await;
            assert!(matches!(refused, Err(Error::NotHeld { .. })), "without {}: {refused:?}", keys[lost]);
            assert!(is_broken(&mut *lock), "it is not the session that it was");
            drop(lock);
            drop(conn);
            for key in &keys {
                wait_until_free(&mut C::observer(rows.server()), key);
            }
        }
    }

    async fn a_slot_has_a_token_and_a_condition<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let key = unique_key("fence_slot");
        let mut last = None;
        for _ in 0..2 {
            let (mut conn, mut other) = (C::open(rows.server()).await, C::open(rows.server()).await);
            let mut inside = conn.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
            let mut second = other.advisory_semaphore(&key, 2).acquire().await.expect("a free slot");
            let token = inside.fencing_token().await.expect("a token");
            assert!(Some(token) > last);
            last = Some(second.fencing_token().await.expect("a token"));
            assert!(last > Some(token));
            let held = inside.held();
            assert_eq!(inside.truths(held.clone()).await.expect("truths"), [true; 5]);
            assert_eq!(second.truths(held.clone()).await.expect("truths"), [false; 5], "it has the other slot");
            second.release().await.expect("a release");
            inside.execute_sql(C::RELEASE_ALL).await;
            assert_eq!(inside.write_if_held(held, 1).await.expect("a statement"), 0);
            let lost = inside.fencing_token().await;
            assert!(matches!(lost, Err(Error::NotHeld { .. })), "{lost:?}");
        }
    }

    async fn a_write_with_a_token_that_is_not_the_greatest_changes_nothing<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let key = unique_key("fence_write");
        let mut conns = [C::open(rows.server()).await, C::open(rows.server()).await];
        let mut tokens = Vec::new();
        for conn in &mut conns {
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            tokens.push(lock.fencing_token().await.expect("a token"));
            lock.release().await.expect("a release");
        }
        let mut wrote = Vec::new();
        for (conn, token, to) in [(0, 0, 1), (0, 0, 2), (1, 1, 3), (0, 0, 4), (1, 1, 5)] {
            wrote.push(conns[conn].write(tokens[token], to).await.expect("a statement"));
        }
        assert_eq!(wrote, [1, 0, 1, 0, 0]);
        let value = C::observer(rows.server()).number("SELECT value FROM fenced WHERE id = 1");
        assert_eq!(value, Some(3));
    }
}

#[both]
on_every_network_server! {
    async fn a_session_that_was_ended_has_no_token_and_the_next_holder_a_greater_one<C: LockTest>(server: &Server) {
        let key = unique_key("fence_killed");
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let id = conn.backend_id().await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let first = lock.fencing_token().await.expect("a token");
        kill(&mut observer, id);
        let mut next = C::open(server).await;
        let mut held = next.advisory_lock(&key).acquire().await.expect("it is free");
        assert!(held.fencing_token().await.expect("a token") > first);
        match lock.fencing_token().await {
            Err(Error::Lost { key: lost, .. }) => assert_eq!(lost, LockKey::from(&key)),
            other => panic!("{other:?}"),
        }
        assert!(is_broken(&mut *lock));
        held.release().await.expect("a release");
    }

    async fn a_token_takes_one_round_trip<C: LockTest>(server: &Server) {
        let mut counted = Counted::<C>::open(server).await;
        let key = unique_key("trips_fence");
        let trips = counted.count(async |conn| {
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            lock.fencing_token().await.expect("a token");
            lock.release().await.expect("a release");
        });
        assert_eq!(trips.await, 3);
        let keys = [unique_key("trips_fence"), unique_key("trips_fence")];
        let trips = counted.count(async |conn| {
            let mut lock = conn.advisory_locks(&keys).acquire().await.expect("free locks");
            lock.fencing_token().await.expect("a token");
            lock.release().await.expect("a release");
        });
        assert_eq!(trips.await, 3);
    }

    async fn a_condition_costs_the_statement_no_round_trip<C: Fenced>(server: &Server) {
        let rows = Rows::new(server);
        let mut counted = Counted::<C>::open(rows.server()).await;
        let trips = counted.count(async |conn| {
            // Other keys have the same text, which the driver finds prepared.
            let mut lock = conn.advisory_lock(unique_key("trips_held")).acquire().await.expect("a free lock");
            let held = lock.held();
            assert_eq!(lock.count_if_held(held).await, Ok(2));
            lock.release().await.expect("a release");
        });
        assert_eq!(trips.await, 3);
    }
}

#[both]
on_mysql! {
    /// Nobody may do more than connect there.
    async fn a_user_without_privileges_has_tokens_and_conditions(server: &Server) {
        let rows = Rows::new(server);
        let mut admin = MysqlConnection::observer(rows.server());
        let user = TestUser::create(MysqlConnection::observer(server), rows.server(), "");
        admin.execute_sql(&format!("GRANT SELECT, UPDATE ON fenced TO {}", &*user));
        let key = unique_key("fence_user");
        let mut conn = MysqlConnection::open_url(user.url()).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let token = lock.fencing_token().await.expect("a token");
        let held = lock.held();
        assert_eq!(lock.write_if_held(held, 1).await.expect("a statement"), 2);
        assert_eq!(lock.write(token, 1).await.expect("a statement"), 1);
        lock.release().await.expect("a release");
    }
}

#[both]
on_postgres! {
    /// Nobody may do more than connect there.
    async fn a_role_that_may_only_connect_has_tokens_and_conditions(server: &Server) {
        let rows = Rows::new(server);
        let mut admin = PgConnection::observer(rows.server());
        admin.execute_sql("REVOKE ALL ON LANGUAGE plpgsql FROM PUBLIC");
        let user = TestUser::create(PgConnection::observer(server), rows.server(), "");
        admin.execute_sql(&format!("GRANT SELECT, UPDATE ON fenced TO {}", &*user));
        for setup in ["SELECT 1", "SET default_transaction_read_only = on", "SET default_transaction_isolation = serializable"] {
            let key = unique_key("fence_role");
            let mut conn = PgConnection::open_url(user.url()).await;
            conn.execute_sql(setup).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            let token = lock.fencing_token().await.expect("a token");
            assert!(lock.fencing_token().await.expect("a token") > token);
            let held = lock.held();
            assert_eq!(lock.truths(held.clone()).await.expect("truths"), [true; 5]);
            lock.execute_sql("RESET default_transaction_read_only").await;
            assert_eq!(lock.write_if_held(held, 1).await.expect("a statement"), 2);
            assert_eq!(lock.write(token, 1).await.expect("a statement"), 1);
            lock.release().await.expect("a release");
        }
        admin.execute_sql("DROP TABLE fenced");
    }

    async fn a_lock_of_the_transaction_has_tokens_until_it_ends(server: &Server) {
        let key = unique_key("fence_xact");
        let (mut conn, mut observer) = (PgConnection::open(server).await, PgConnection::observer(server));
        let tokens = conn.advisory_lock(&key).transaction(async |conn| {
            let mut tokens = vec![conn.advisory_xact_lock(&key).fencing_token().await?];
            tokens.push(conn.advisory_xact_lock(&key).fencing_token().await?);
            Ok::<_, Error>(tokens)
        });
        let mut tokens = tokens.await.expect("tokens");
        begin(&mut conn).await;
        for asked in [false, true] {
            // It is not acquired yet, and then not in that mode. The transaction goes on.
            let lock = conn.advisory_xact_lock(&key);
            let mut lock = if asked { lock.shared() } else { lock };
            match lock.fencing_token().await {
                Err(Error::NotHeld { key: other, .. }) => assert_eq!(other, LockKey::from(&key)),
                other => panic!("{other:?}"),
            }
            assert_eq!(conn.number("SELECT 1").await, Some(1));
            assert_eq!(depth(&mut conn), 1);
            conn.advisory_xact_lock(&key).acquire().await.expect("a free lock");
        }
        tokens.push(conn.advisory_xact_lock(&key).fencing_token().await.expect("a token"));
        commit(&mut conn).await;
        assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
        let after = conn.advisory_xact_lock(&key).fencing_token().await;
        assert!(matches!(after, Err(Error::NotHeld { .. })), "{after:?}");
        let empty = conn.advisory_xact_lock("").fencing_token().await;
        assert!(matches!(empty, Err(Error::InvalidKey(_))), "{empty:?}");
        assert_clean(&mut conn, &mut observer).await;
    }

    async fn locks_of_the_transaction_have_a_token_while_all_are_held(server: &Server) {
        let (number, pair) = (i64::from(std::process::id()) << 22, (std::process::id() as i32, -4));
        let keys: [LockKey; 3] = [unique_key("fence_xact_all").into(), number.into(), pair.into()];
        let mut conn = PgConnection::open(server).await;
        let token = conn.advisory_locks(&keys).transaction(async |conn| conn.advisory_xact_locks(&keys).fencing_token().await);
        let token = token.await.expect("a token");
        begin(&mut conn).await;
        for key in &keys {
            let none = conn.advisory_xact_locks(&keys).fencing_token().await;
            assert!(matches!(none, Err(Error::NotHeld { .. })), "{none:?}");
            conn.advisory_xact_lock(key).acquire().await.expect("a free lock");
        }
        assert!(conn.advisory_xact_locks(&keys).fencing_token().await.expect("a token") > token);
        commit(&mut conn).await;
    }

    async fn shared_locks_and_pairs_of_numbers_have_tokens_and_conditions(server: &Server) {
        let rows = Rows::new(server);
        let number = 1_000_000_007 + i32::try_from(std::process::id() % 1_000_000).expect("it is small");
        let keys = [LockKey::from((number, -number)), (i64::from(number) << 33).into(), (-i64::from(number)).into()];
        for key in keys {
            let (mut one, mut two) = (PgConnection::open(rows.server()).await, PgConnection::open(rows.server()).await);
            let mut first = one.advisory_lock(&key).shared().acquire().await.expect("a free lock");
            let mut second = two.advisory_lock(&key).shared().acquire().await.expect("it is shared");
            let token = first.fencing_token().await.expect("a token");
            assert!(second.fencing_token().await.expect("a token") > token);
            let held = first.held();
            assert_eq!(first.truths(held.clone()).await.expect("truths"), [true; 5]);
            // The other session shares the lock, so it is true there as well.
            assert_eq!(second.truths(held.clone()).await.expect("truths"), [true; 5]);
            first.release().await.expect("a release");
            second.release().await.expect("a release");
            let mut alone = one.advisory_lock(&key).acquire().await.expect("a free lock");
            assert_eq!(alone.truths(held).await.expect("truths"), [false; 5], "it is held in another mode");
            assert!(alone.fencing_token().await.expect("a token") > token);
            alone.release().await.expect("a release");
        }
    }

    /// A position in the log that a crash undoes would be given out again.
    async fn a_token_is_flushed_when_it_is_returned_and_no_setting_changes(server: &Server) {
        let key = unique_key("fence_flush");
        let mut conn = PgConnection::open(server).await;
        for setting in ["off", "local", "on"] {
            conn.execute_sql(&format!("SET synchronous_commit = {setting}")).await;
            let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
            for _ in 0..20 {
                let token = i64::from(lock.fencing_token().await.expect("a token"));
                let flushed = "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint";
                assert!(lock.number(flushed).await >= Some(token), "{setting}");
            }
            // In a transaction it is with the COMMIT.
            begin(&mut *lock).await;
            let token = i64::from(lock.fencing_token().await.expect("a token"));
            commit(&mut *lock).await;
            let flushed = "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint";
            assert!(lock.number(flushed).await >= Some(token), "{setting}");
            let after = lock.text("SELECT current_setting('synchronous_commit')").await;
            assert_eq!(after.as_deref(), Some(setting));
            lock.release().await.expect("a release");
        }
    }

    async fn a_session_that_has_forgotten_its_statements_has_tokens(server: &Server) {
        let key = unique_key("fence_deallocate");
        let mut conn = PgConnection::open(server).await;
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        let first = lock.fencing_token().await.expect("a token");
        lock.execute_sql("DEALLOCATE ALL").await;
        assert!(lock.fencing_token().await.expect("a token") > first);
        lock.execute_sql("DISCARD ALL").await;
        let lost = lock.fencing_token().await;
        assert!(matches!(lost, Err(Error::NotHeld { .. })), "{lost:?}");
    }
}
