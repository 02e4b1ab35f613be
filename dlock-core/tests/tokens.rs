//! Fencing tokens and conditions, on all servers: every conversation with every answer, given up at every step, and the
//! texts.

#![cfg(all(feature = "postgres", feature = "mysql", feature = "sqlite"))]

use std::collections::BTreeSet;
use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Bind, Cause, Dialect, ErrorFields, Failure, Hold, Machine,
    Mysql, Postgres, Prepared, Reason, Request, Rows, Session, Sqlite, Statement, Step,
    TransactionDialect,
};
use dlock_core::{FencingToken, LockKey, Mode};

const BASE: i64 = 4_611_686_018_427_387_904;

/// What a session holds that was granted the lock at once.
fn hold<D: Dialect>(key: impl Into<LockKey>, mode: Mode, droppable: bool) -> Hold<D::Key> {
    let ask = Ask {
        mode,
        droppable,
        ..Ask::new(key.into())
    };
    let mut machine = D::acquire(&ask, Session::default()).expect("a valid key");
    let Step::Query(statement) = machine.start(Duration::ZERO) else {
        panic!("it asks");
    };
    let granted = match (statement.text().starts_with("/*"), droppable) {
        (true, true) => BASE + tag(&statement) + 1,
        _ => 1,
    };
    match machine.next(Answer::Rows(Rows::Number(Some(granted))), Duration::ZERO) {
        Step::Done(Ok(Some(hold))) => hold,
        other => panic!("{other:?}"),
    }
}

/// The tag of a statement for MySQL.
fn tag(statement: &Statement) -> i64 {
    match statement.binds.iter().next() {
        Some(Bind::BigInt(tag)) => *tag,
        other => panic!("{other:?}"),
    }
}

/// The same for several locks.
fn hold_all<D: Dialect>(keys: &[i64], droppable: bool) -> Hold<D::Key> {
    let ask = Ask {
        droppable,
        ..Ask::all(keys.iter().map(|key| LockKey::from(*key)))
    };
    let mut machine = D::acquire(&ask, Session::default()).expect("valid keys");
    let mut step = machine.start(Duration::ZERO);
    loop {
        let granted = match step {
            Step::Done(Ok(Some(hold))) => return hold,
            // All are got, so the place of the first that is taken is 0.
            Step::Query(statement) if statement.text().starts_with("/*") => {
                assert!(droppable, "without that the answer is another one");
                BASE + tag(&statement)
            }
            Step::Query(_) => 1,
            other => panic!("{other:?}"),
        };
        step = machine.next(Answer::Rows(Rows::Number(Some(granted))), Duration::ZERO);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Server {
    Postgres,
    /// Without marking the session broken where it does not hold the lock.
    PostgresTransaction,
    Mysql,
    /// Whose answers may be to earlier questions.
    MysqlDroppable,
    Sqlite,
}

/// Each answer, whether it fits the question or not.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    Number(Option<i64>),
    Tagged(Option<i64>),
    Stale(Option<i64>),
    Untagged,
    Text,
    Done,
    Error,
    Lost,
}

const ANSWERS: [Says; 15] = [
    Says::Number(Some(7)),
    Says::Number(Some(i64::MAX)),
    Says::Number(Some(0)),
    Says::Number(Some(-7)),
    Says::Number(None),
    Says::Tagged(Some(7)),
    Says::Tagged(Some(0)),
    Says::Tagged(Some(-7)),
    Says::Tagged(None),
    Says::Stale(Some(7)),
    Says::Untagged,
    Says::Text,
    Says::Done,
    Says::Error,
    Says::Lost,
];

impl Says {
    fn answer(self, tag: i64) -> Answer {
        let error = |lost| {
            Answer::Error(ErrorFields {
                lost,
                cause: Cause::new("why"),
                ..ErrorFields::default()
            })
        };
        match self {
            Says::Number(number) => Answer::Rows(Rows::Number(number)),
            Says::Tagged(number) => Answer::Rows(Rows::Pair(Some(BASE + tag), number)),
            Says::Stale(number) => Answer::Rows(Rows::Pair(Some(BASE + tag + (1 << 20)), number)),
            Says::Untagged => Answer::Rows(Rows::Pair(None, Some(7))),
            Says::Text => Answer::Rows(Rows::Text("7".into())),
            Says::Done => Answer::Done,
            Says::Error => error(false),
            Says::Lost => error(true),
        }
    }
}

fn failed(reason: Reason, aftermath: Aftermath, caused: bool) -> Result<FencingToken, Failure> {
    Err(Failure {
        reason,
        aftermath,
        cause: match caused {
            true => Cause::new("why"),
            false => Cause::default(),
        },
        key: None,
    })
}

/// What comes of it. `None`: something else is sent.
fn expected(
    server: Server,
    sent: usize,
    before: Option<Says>,
    says: Says,
) -> Option<Result<FencingToken, Failure>> {
    use Aftermath::*;
    let is_mysql = matches!(server, Server::Mysql | Server::MysqlDroppable);
    let not_held = failed(
        Reason::NotHeld,
        match server {
            Server::PostgresTransaction => Clean,
            _ => MarkBroken,
        },
        false,
    );
    let drawn = |number: Option<i64>| match number {
        Some(number @ 1..) => Ok(FencingToken::from(number)),
        _ => not_held.clone(),
    };
    Some(match says {
        Says::Lost => failed(Reason::Lost, MarkBroken, true),
        Says::Number(number) if !is_mysql => drawn(number),
        Says::Tagged(number) if is_mysql => drawn(number),
        Says::Stale(_) | Says::Untagged if is_mysql => {
            failed(Reason::OutOfStep, EndSessionUnread, false)
        }
        Says::Error | Says::Done
            if matches!(server, Server::Postgres | Server::PostgresTransaction) && sent == 1 =>
        {
            return None;
        }
        // To send it again could hang.
        Says::Error if is_mysql => failed(Reason::Database, MarkBroken, true),
        Says::Error => failed(Reason::Database, Clean, true),
        Says::Done if is_mysql => failed(Reason::Database, Clean, false),
        Says::Done => failed(Reason::Database, Clean, before == Some(Says::Error)),
        _ if is_mysql => failed(Reason::Database, Clean, false),
        _ => failed(Reason::OutOfStep, EndSessionUnread, false),
    })
}

/// Walks every conversation, and gives it up at every step.
fn walk<M: Machine<Output = FencingToken>>(server: Server, machine: impl Fn() -> M) {
    let mut conversations = 0;
    let is_mysql = matches!(server, Server::Mysql | Server::MysqlDroppable);
    let abandoned = Abandoned {
        broken: is_mysql,
        ..Abandoned::default()
    };
    for first in ANSWERS {
        for second in ANSWERS {
            let mut machine = machine();
            assert!(!M::TIMED, "it does not look at the time");
            let mut step = machine.start(Duration::ZERO);
            for (sent, says) in [first, second].into_iter().enumerate() {
                let Step::Query(statement) = &step else {
                    panic!("{step:?}")
                };
                assert_eq!(statement.request, None, "an unread answer frees no lock");
                let tag = if is_mysql { tag(statement) } else { 0 };
                assert_eq!(machine.abandon(), abandoned, "nothing is to be undone");
                step = machine.next(says.answer(tag), Duration::ZERO);
                let before = (sent == 1).then_some(first);
                match (expected(server, sent + 1, before, says), &step) {
                    (Some(expected), Step::Done(result)) => {
                        assert_eq!(*result, expected, "{server:?}: {first:?}, {says:?}");
                        conversations += 1;
                        break;
                    }
                    (None, Step::Query(_)) => {}
                    (expected, step) => {
                        panic!("{server:?}, {first:?}, {says:?}: {expected:?}, {step:?}")
                    }
                }
            }
            assert!(matches!(step, Step::Done(_)), "two answers end it");
        }
    }
    assert_eq!(conversations, ANSWERS.len() * ANSWERS.len());
}

#[test]
fn every_draw_with_every_answer() {
    for mode in [Mode::Exclusive, Mode::Shared] {
        let held = hold::<Postgres>(42, mode, false);
        walk(Server::Postgres, || Postgres::fencing_token(&held));
        let ask = Ask {
            mode,
            ..Ask::new(42.into())
        };
        let draw = || Postgres::fencing_token_in_transaction(&ask).expect("a valid key");
        walk(Server::PostgresTransaction, draw);
        let held = hold::<Sqlite>(42, mode, false);
        walk(Server::Sqlite, || Sqlite::fencing_token(&held));
    }
    for (server, droppable) in [(Server::Mysql, false), (Server::MysqlDroppable, true)] {
        let held = hold::<Mysql>("report", Mode::Exclusive, droppable);
        walk(server, || Mysql::fencing_token(&held));
    }
    let several = hold_all::<Postgres>(&[3, -4, 5], false);
    walk(Server::Postgres, || Postgres::fencing_token(&several));
    let ask = Ask::all([3, -4, 5].map(LockKey::from));
    let draw = || Postgres::fencing_token_in_transaction(&ask).expect("valid keys");
    walk(Server::PostgresTransaction, draw);
    let several = hold_all::<Sqlite>(&[3, 4, 5], false);
    walk(Server::Sqlite, || Sqlite::fencing_token(&several));
    let several = hold_all::<Mysql>(&[3, 4, 5], true);
    walk(Server::MysqlDroppable, || Mysql::fencing_token(&several));
    let invalid = Postgres::fencing_token_in_transaction(&Ask::new("".into())).err();
    assert!(matches!(
        invalid,
        Some(Failure {
            reason: Reason::InvalidKey(_),
            ..
        })
    ));
}

fn first<T>(mut machine: impl Machine<Output = T>) -> Statement {
    match machine.start(Duration::ZERO) {
        Step::Query(statement) => statement,
        _ => panic!("it asks"),
    }
}

fn binds<'b>(binds: impl IntoIterator<Item = &'b Bind>) -> Vec<Bind> {
    binds.into_iter().cloned().collect()
}

/// The text and the binds of a draw, and of a condition.
fn texts<D: Dialect>(hold: &Hold<D::Key>) -> [(String, Vec<Bind>); 2] {
    let (draw, held) = (first(D::fencing_token(hold)), D::held(hold));
    assert_eq!(draw.prepared, Prepared::ByText);
    [
        (draw.text(), binds(draw.binds.iter())),
        (held.text(), binds(held.binds.iter())),
    ]
}

#[test]
fn there_is_one_text_for_all_keys_and_modes() {
    let mut seen = BTreeSet::new();
    let own_lock = |high, low, subid, mode: &str| {
        vec![
            Bind::BigInt(high),
            Bind::BigInt(low),
            Bind::Integer(subid),
            Bind::Text(mode.into()),
        ]
    };
    for (mode, name) in [
        (Mode::Exclusive, "ExclusiveLock"),
        (Mode::Shared, "ShareLock"),
    ] {
        for (key, [high, low], subid) in [
            (LockKey::from(42), [0, 42], 1),
            (LockKey::from(-1), [0xffff_ffff, 0xffff_ffff], 1),
            (LockKey::from((1, -2)), [1, 0xffff_fffe], 2),
        ] {
            for (text, binds) in texts::<Postgres>(&hold::<Postgres>(key, mode, false)) {
                assert_eq!(binds, own_lock(high, low, subid, name));
                seen.insert(text);
            }
        }
        for key in [42, 43] {
            let hold = hold::<Sqlite>(key, mode, false);
            let Some(Request(request)) = Sqlite::requests(&hold).next() else {
                panic!("it has a number");
            };
            for (text, binds) in texts::<Sqlite>(&hold) {
                assert_eq!(binds, [Bind::BigInt(key), Bind::BigInt(request)]);
                seen.insert(text);
            }
        }
    }
    for (key, droppable) in [("report", false), ("Report", false), ("report", true)] {
        let name = Bind::Binary(LockKey::from(key).to_mysql().expect("a key").into_bytes());
        let hold = hold::<Mysql>(key, Mode::Exclusive, droppable);
        let [(draw, drawn), (held, condition)] = texts::<Mysql>(&hold);
        assert_eq!(
            (&drawn[1..], &condition[..]),
            (&[name.clone()][..], &[name][..])
        );
        seen.extend([draw, held]);
    }
    assert_eq!(seen.len(), 6, "two for each server: {seen:#?}");
    let [sqlite_held, mysql_held] = [
        "(SELECT dlock_is_held(?, ?))",
        "(IS_USED_LOCK(CONVERT(? USING utf8mb4)) <=> CONNECTION_ID())",
    ];
    assert!(seen.contains(sqlite_held) && seen.contains(mysql_held));
    assert!(seen.contains("SELECT dlock_fencing_token(?, ?)"));
}

/// All keys are in the binds, and their number does not change the text.
#[test]
fn there_is_one_text_for_any_number_of_locks() {
    let mut seen = BTreeSet::new();
    for keys in [&[3, 4][..], &[3, 4, 5]] {
        let list = |separator: &str| {
            keys.iter()
                .map(i64::to_string)
                .collect::<Vec<_>>()
                .join(separator)
        };
        for (text, binds) in texts::<Postgres>(&hold_all::<Postgres>(keys, false)) {
            let array = Bind::Text(format!("{{{}}}", list(",")));
            let mode = Bind::Text("ExclusiveLock".into());
            assert_eq!(binds, [array, Bind::BigInt(keys.len() as i64), mode]);
            seen.insert(text);
        }
        let hold = hold_all::<Sqlite>(keys, false);
        let requests = Sqlite::requests(&hold).map(|Request(request)| request);
        let holds = keys
            .iter()
            .zip(requests)
            .map(|(key, request)| format!("{key} {request}"));
        let holds = Bind::Text(holds.collect::<Vec<_>>().join(" "));
        for (text, binds) in texts::<Sqlite>(&hold) {
            assert_eq!(binds[0], holds);
            seen.insert(text);
        }
        for (text, binds) in texts::<Mysql>(&hold_all::<Mysql>(keys, true)) {
            let Some(Bind::Binary(names)) = binds.last() else {
                panic!("{binds:?}");
            };
            let names = String::from_utf8(names.clone()).expect("JSON");
            for key in keys {
                let name = LockKey::from(*key).to_mysql().expect("a key");
                assert!(names.contains(&format!("\"{name}\"")), "{names}");
            }
            seen.insert(text);
        }
    }
    assert_eq!(seen.len(), 6, "two for each server: {seen:#?}");
}

/// Whatever `search_path` says, PostgreSQL's own functions are called.
#[test]
fn functions_of_postgresql_are_named_with_their_schema() {
    let one = texts::<Postgres>(&hold::<Postgres>(42, Mode::Exclusive, false));
    let several = texts::<Postgres>(&hold_all::<Postgres>(&[42, 43], false));
    for (text, _) in one.into_iter().chain(several) {
        let calls = text.match_indices('(').filter_map(|(at, _)| {
            let before = &text[..at];
            let start =
                before.rfind(|letter: char| !letter.is_alphanumeric() && !"_.".contains(letter));
            let name = &before[start.map_or(0, |start| start + 1)..];
            (!name.is_empty()).then_some(name)
        });
        for name in calls {
            assert!(
                name.starts_with("pg_catalog.") || ["EXISTS", "k"].contains(&name),
                "{name} in {text}"
            );
        }
        assert!(
            !text.contains(['=', '<', '>', '+']),
            "operators belong to a schema: {text}"
        );
    }
}

#[test]
fn a_token_keeps_its_order_as_a_number() {
    let numbers = [i64::MIN, -1, 0, 1, 41, 42, i64::MAX];
    let tokens = numbers.map(FencingToken::from);
    assert!(tokens.is_sorted());
    assert_eq!(tokens.map(i64::from), numbers);
    assert_eq!(tokens[5].to_string(), "42");
    assert_eq!(format!("{:>4}", tokens[5]), "  42");
}
