//! Single cases: one call after the other.

use std::sync::Arc;
use std::time::Duration;

use dlock_core::proto::manager::{
    Action, Config, ConnId, HoldId, Identity, ManagedDialect, Manager, News, Outcome, Wanted,
};
use dlock_core::proto::{Ask, Mysql};
use dlock_core::{LockKey, Mode};

const CONFIG: Config = Config {
    connections: 4,
    lease: Some(Duration::from_secs(30)),
    longest_wait: None,
    turns: 64,
    turn: Duration::from_millis(100),
    tells_after: None,
};

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn lock(number: i64) -> (Identity, Arc<Wanted>) {
    let wanted = Wanted {
        key: LockKey::from(number),
        mode: Mode::Exclusive,
        permits: None,
    };
    (Identity::Number(number), Arc::new(wanted))
}

fn all(manager: &mut Manager) -> Vec<Action> {
    std::iter::from_fn(|| manager.poll()).collect()
}

/// The connection that is to be opened, opened.
fn open(manager: &mut Manager, at: Duration) -> ConnId {
    let [Action::Open(conn)] = all(manager)[..] else {
        panic!("one connection is opened")
    };
    manager.sent(conn, at);
    manager.answered(conn);
    assert!(manager.opened(conn, at));
    conn
}

/// A manager of so many connections, and one that nobody needed: the manager closes it at 20 seconds.
fn closing(connections: usize) -> (Manager, ConnId) {
    let mut manager = Manager::new(Config {
        connections,
        ..CONFIG
    });
    let (identity, wanted) = lock(1);
    let ticket = manager.request(identity, wanted, None, millis(0));
    manager.cancel(ticket, millis(1));
    let conn = open(&mut manager, millis(2));
    manager.tick(millis(20_000));
    assert_eq!(all(&mut manager), [Action::Close(conn)]);
    (manager, conn)
}

#[test]
fn while_a_connection_is_closed_others_are_opened() {
    let (mut manager, _) = closing(2);
    let (identity, wanted) = lock(2);
    manager.request(identity, wanted, Some(Duration::ZERO), millis(20_001));
    open(&mut manager, millis(20_002));
    assert!(matches!(all(&mut manager)[..], [Action::Acquire { .. }]));
}

#[test]
fn a_connection_that_is_never_closed_gives_its_place_to_another() {
    let (mut manager, hangs) = closing(1);
    let (identity, wanted) = lock(2);
    manager.request(identity, wanted, None, millis(20_001));
    assert_eq!(all(&mut manager), []);
    assert_eq!(manager.next_tick(), Some(millis(50_000)));
    manager.tick(millis(50_000));
    let conn = open(&mut manager, millis(50_001));
    // What the driver still says of the other one changes nothing.
    manager.closed(hangs, millis(50_002));
    manager.done(hangs, Outcome::Alive, millis(50_002));
    let [Action::Acquire { conn: on, .. }] = all(&mut manager)[..] else {
        panic!("the lock is asked for")
    };
    assert_eq!(on, conn);
}

#[test]
fn a_manager_is_closed_although_a_connection_is_not() {
    let (mut manager, _) = closing(1);
    manager.close(millis(21_000));
    assert_eq!(all(&mut manager), []);
    manager.tick(millis(50_000));
    assert_eq!(all(&mut manager), [Action::Closed]);
}

/// A wait of 28 seconds in one statement, granted. The session is asked whether it is still there.
fn granted_late() -> (Manager, ConnId) {
    let mut manager = Manager::new(CONFIG);
    let (identity, wanted) = lock(1);
    manager.request(identity, wanted, None, millis(0));
    let conn = open(&mut manager, millis(1));
    let [Action::Acquire { .. }] = all(&mut manager)[..] else {
        panic!("the lock is asked for")
    };
    manager.sent(conn, millis(2));
    manager.answered(conn);
    manager.done(conn, Outcome::Granted { slot: None }, millis(28_000));
    assert_eq!(all(&mut manager), [Action::KeepAlive(conn)]);
    manager.sent(conn, millis(28_001));
    manager.tick(millis(28_002));
    assert_eq!(all(&mut manager), []);
    (manager, conn)
}

#[test]
fn a_grant_after_a_wait_as_long_as_the_lease_is_confirmed() {
    let (mut manager, conn) = granted_late();
    manager.answered(conn);
    manager.done(conn, Outcome::Alive, millis(28_003));
    let news = all(&mut manager);
    assert!(
        matches!(news[..], [Action::Tell(_, News::Granted { .. })]),
        "{news:?}"
    );
}

/// The process was stopped before it read the answer.
#[test]
fn an_old_answer_does_not_confirm_a_grant() {
    let (mut manager, conn) = granted_late();
    manager.answered(conn);
    manager.done(conn, Outcome::Alive, millis(60_000));
    assert_eq!(all(&mut manager), [Action::KeepAlive(conn)]);
    manager.sent(conn, millis(60_001));
    manager.answered(conn);
    manager.done(conn, Outcome::Alive, millis(60_002));
    let news = all(&mut manager);
    assert!(
        matches!(news[..], [Action::Tell(_, News::Granted { .. })]),
        "{news:?}"
    );
}

#[test]
fn a_grant_that_is_never_confirmed_ends() {
    let (mut manager, conn) = granted_late();
    assert_eq!(manager.next_tick(), Some(millis(58_001)));
    manager.tick(millis(58_001));
    let actions = all(&mut manager);
    assert_eq!(actions[0], Action::Close(conn));
    assert!(matches!(actions[1..], [Action::Open(_)]), "{actions:?}");
}

/// It waits for another connection, because the server would let it in wherever it holds the lock already.
#[test]
fn readers_that_wait_for_a_connection_hold_up_nobody_who_can_ask_on_another() {
    let mut manager = Manager::new(Config {
        connections: 2,
        turns: 1,
        ..CONFIG
    });
    let (identity, wanted) = lock(1);
    let shared = Arc::new(Wanted {
        key: wanted.key.clone(),
        mode: Mode::Shared,
        permits: None,
    });
    let reader = |manager: &mut Manager| {
        manager.request(identity.clone(), Arc::clone(&shared), None, millis(0))
    };
    reader(&mut manager);
    let first = open(&mut manager, millis(1));
    asked(&mut manager);
    granted(&mut manager, first, millis(2));
    all(&mut manager);

    reader(&mut manager);
    let [Action::Open(second)] = all(&mut manager)[..] else {
        panic!("it holds the lock on the first one")
    };
    let (identity, wanted) = lock(2);
    manager.request(identity, wanted, None, millis(3));
    let (_, conn, _) = asked(&mut manager);
    assert_eq!(conn, first, "which is free");

    manager.sent(second, millis(4));
    manager.answered(second);
    assert!(manager.opened(second, millis(4)));
    let (keys, conn, _) = asked(&mut manager);
    assert_eq!((keys, conn), (vec![LockKey::from(1)], second));
}

/// Locks of MySQL, by their names.
fn names(names: &[&str]) -> Vec<(Identity, Arc<Wanted>)> {
    let ask = Ask::all(names.iter().map(LockKey::mysql_name));
    let identities = Mysql::identities(&ask).expect("they are names");
    let wanted = |key| Wanted {
        key,
        mode: Mode::Exclusive,
        permits: None,
    };
    let locks = identities.into_iter();
    locks
        .map(|(identity, key)| (identity, Arc::new(wanted(key))))
        .collect()
}

/// The locks that the only action asks for, on which connection and as which hold.
fn asked(manager: &mut Manager) -> (Vec<LockKey>, ConnId, HoldId) {
    let mut actions = all(manager);
    let Some(Action::Acquire {
        conn,
        hold,
        what,
        how,
    }) = actions.pop().filter(|_| actions.is_empty())
    else {
        panic!("a lock is asked for")
    };
    let ask = what.ask(how, false);
    (ask.keys().cloned().collect(), conn, hold)
}

fn granted(manager: &mut Manager, conn: ConnId, at: Duration) {
    manager.sent(conn, at);
    manager.answered(conn);
    manager.done(conn, Outcome::Granted { slot: None }, at);
}

#[test]
fn names_that_differ_in_case_only_wait_for_each_other() {
    let mut manager = Manager::new(CONFIG);
    for name in ["User", "user"] {
        let (identity, wanted) = names(&[name]).remove(0);
        manager.request(identity, wanted, None, millis(0));
    }
    let conn = open(&mut manager, millis(1));
    let (keys, _, hold) = asked(&mut manager);
    assert_eq!(keys, [LockKey::mysql_name("User")]);
    granted(&mut manager, conn, millis(2));
    let news = all(&mut manager);
    let [Action::Tell(ticket, News::Granted { .. })] = news[..] else {
        panic!("only one of them is granted: {news:?}")
    };
    manager.release(ticket, millis(3));
    // The other one is not the same lock on MariaDB.
    assert_eq!(all(&mut manager), [Action::Release { conn, hold }]);
    manager.done(conn, Outcome::Released, millis(4));
    let released = Action::Tell(ticket, News::Released);
    assert_eq!(manager.poll(), Some(released));
    assert_eq!(asked(&mut manager).0, [LockKey::mysql_name("user")]);
}

#[test]
fn several_names_that_differ_in_case_only_are_taken_as_one() {
    let mut manager = Manager::new(CONFIG);
    let ticket = manager.request_all(names(&["user", "b", "User"]), None, millis(0));
    let conn = open(&mut manager, millis(1));
    assert_eq!(asked(&mut manager).0, [LockKey::mysql_name("b")]);
    granted(&mut manager, conn, millis(2));
    let (keys, conn, _) = asked(&mut manager);
    assert_eq!(keys, ["User", "user"].map(LockKey::mysql_name));
    granted(&mut manager, conn, millis(3));
    let news = News::Granted { slot: None };
    assert_eq!(all(&mut manager), [Action::Tell(ticket, news)]);
    assert_eq!(manager.holds_of(ticket).len(), 2);
    // Who wants only one of them does not get both.
    let (identity, wanted) = names(&["User"]).remove(0);
    manager.request(identity, wanted, None, millis(4));
    assert!(manager.release(ticket, millis(5)));
    let actions = all(&mut manager);
    assert!(
        matches!(actions[..], [Action::Release { .. }]),
        "{actions:?}"
    );
}

#[test]
fn a_lease_is_at_most_the_longest_that_every_server_takes() {
    let mut manager = Manager::new(Config {
        lease: Some(Duration::MAX),
        ..CONFIG
    });
    let (identity, wanted) = lock(1);
    manager.request(identity, wanted, None, millis(0));
    assert_eq!(manager.next_tick(), Some(Config::LONGEST_LEASE));
    let conn = open(&mut manager, millis(1));
    asked(&mut manager);
    granted(&mut manager, conn, millis(2));
    manager.tick(Config::LONGEST_LEASE);
    let actions = all(&mut manager);
    let lost = |action: &Action| matches!(action, Action::Tell(_, News::Lost));
    assert!(actions.iter().any(lost), "{actions:?}");
}
