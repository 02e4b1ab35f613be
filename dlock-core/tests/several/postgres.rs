use std::fmt::Debug;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{
    Aftermath, Answer, Bind, Columns, Dialect, ErrorFields, Hold, Machine, Postgres, Prepared,
    Reason, Rows, Statement, Step,
};

use crate::walk::*;

/// Keys 1, 2 and 3.
pub(crate) struct Server;

pub(crate) fn number(number: i64) -> Answer {
    Answer::Rows(Rows::Number(Some(number)))
}

/// The keys of an array.
pub(crate) fn list(array: &str) -> Vec<usize> {
    let numbers = array.trim_matches(['{', '}']).split(',');
    let numbers = numbers.filter(|number| !number.is_empty());
    numbers
        .map(|number| number.parse::<usize>().expect("a key") - 1)
        .collect()
}

/// What stands between two texts.
pub(crate) fn between<'t>(text: &'t str, before: &str, after: &str) -> &'t str {
    let (_, rest) = text
        .split_once(before)
        .unwrap_or_else(|| panic!("{before} in {text}"));
    rest.split_once(after)
        .unwrap_or_else(|| panic!("{after} in {text}"))
        .0
}

fn big(bind: &Bind) -> i64 {
    match bind {
        Bind::BigInt(number) => *number,
        other => panic!("{other:?}"),
    }
}

/// The session does not know the statement.
fn not_there(world: &World) -> Outcome {
    let error = ErrorFields::default();
    fine(Answer::Error(error), world.clone())
}

impl Server {
    fn take_all(world: &World, keys: &[usize], mark: i64) -> Vec<Outcome> {
        if let Some(place) = keys.iter().position(|key| world.taken[*key]) {
            let taken = number(-(place as i64) - 1);
            return vec![fine(taken, world.clone()), fault(world.clone())];
        }
        let mut all = world.clone();
        let mut outcomes = vec![fault(world.clone())];
        for key in keys {
            all.holds[*key] += 1;
            // A cancel between two of them. The mark goes with the transaction.
            outcomes.push(fault(all.clone()));
        }
        all.mark = mark;
        outcomes.insert(0, fine(number(1), all));
        outcomes
    }

    fn unlock_all(world: &World, keys: &[usize]) -> Vec<Outcome> {
        let mut all = world.clone();
        let mut lost = None;
        let mut outcomes = vec![fault(world.clone())];
        for (place, key) in keys.iter().enumerate() {
            match all.holds[*key] {
                0 => {
                    lost.get_or_insert(-(place as i64) - 1);
                }
                _ => all.holds[*key] -= 1,
            }
            outcomes.push(fault(all.clone()));
        }
        outcomes.insert(0, fine(number(lost.unwrap_or(1)), all));
        outcomes
    }

    pub(crate) fn query(world: &World, statement: &Statement) -> (Vec<Outcome>, bool) {
        let text = statement.sql.concat();
        let binds: Vec<Bind> = statement.binds.iter().cloned().collect();
        let array = |bind: &Bind| match bind {
            Bind::Text(array) => list(array),
            other => panic!("{other:?}"),
        };
        if text.contains("unnest") && text.contains("pg_prepared_statements") {
            let keys = array(&binds[0]);
            let held = keys.iter().filter(|key| world.holds[**key] > 0).count();
            let known = i64::from(!world.forgot);
            let answer = Answer::Rows(Rows::Pair(Some(held as i64), Some(known)));
            return (
                vec![fine(answer, world.clone()), fault(world.clone())],
                false,
            );
        }
        if text.contains("unnest") && text.contains("pg_try_advisory_xact_lock") {
            assert_eq!(statement.columns, Columns::NoRow);
            assert_eq!(text.matches("bigint[]").count(), 3);
            let (keys, mark) = (array(&binds[0]), big(&binds[2]));
            assert!(keys.is_sorted(), "{keys:?}");
            let mut outcomes = match mark {
                0 => Self::unlock_all(world, &keys),
                mark => Self::take_all(world, &keys, mark),
            };
            if statement.prepared != Prepared::Never {
                let mut forgot = world.clone();
                forgot.forgot = true;
                outcomes.push(fault(forgot));
                if world.forgot {
                    return (vec![not_there(world)], false);
                }
            }
            return (outcomes, !keys.is_empty());
        }
        if text == "SELECT pg_catalog.version()" {
            let version = Rows::Text("PostgreSQL 17.2".into());
            return (vec![fine(Answer::Rows(version), world.clone())], false);
        }
        if text.contains("pg_locks") {
            let key = big(&binds[1]) as usize - 1;
            let mut held = i64::from(world.holds[key] > 0);
            if text.contains("pg_prepared_statements") && world.forgot {
                held += 2;
            }
            return (vec![fine(number(held), world.clone())], false);
        }
        if text.contains("pg_try_advisory_lock") {
            // Sync: the key, and the limit if it waits. Async: the mark, the key.
            let droppable = text.contains("dlock.granted");
            let key = big(&binds[usize::from(droppable)]) as usize - 1;
            if world.forgot && statement.prepared != Prepared::Never {
                return (vec![not_there(world)], false);
            }
            if world.taken[key] {
                return (
                    vec![fine(number(0), world.clone()), fault(world.clone())],
                    true,
                );
            }
            let mut next = world.clone();
            next.holds[key] += 1;
            if droppable {
                let Bind::Text(mark) = &binds[0] else {
                    panic!("{:?}", binds[0])
                };
                next.mark = mark_of(mark);
            }
            return (vec![fine(number(1), next), fault(world.clone())], true);
        }
        assert!(text.contains("pg_try_advisory_xact_lock($2)"), "{text}");
        (vec![fine(number(1), world.clone())], false)
    }
}

impl super::walk::Server for Server {
    fn receive<T: Debug>(&self, world: &World, step: &Step<T>) -> (Vec<Outcome>, bool) {
        match step {
            Step::Query(statement) => Self::query(world, statement),
            other => panic!("{other:?}"),
        }
    }

    fn obey(&self, world: &mut World, message: &str) {
        let array = |message: &str| list(between(message, "unnest('", "'::bigint[]"));
        let unlock = |world: &mut World, keys: Vec<usize>| {
            for key in keys {
                world.holds[key] = world.holds[key].saturating_sub(1);
            }
        };
        if !message.contains("dlock.granted") {
            unlock(world, array(message));
            return;
        }
        let mark = mark_of(between(message, "'dlock.granted', true), '", "'"));
        if world.mark == mark {
            world.mark = 0;
            let keys = match message.contains("unnest") {
                true => array(message),
                false => list(between(message, "pg_advisory_unlock('", "'::bigint")),
            };
            unlock(world, keys);
        }
    }
}

/// The mark of a statement for one lock begins with its limit.
fn mark_of(text: &str) -> i64 {
    text.strip_prefix("0.0")
        .unwrap_or(text)
        .parse()
        .expect("a mark")
}

pub(crate) fn keys() -> [LockKey; KEYS] {
    [1.into(), 2.into(), 3.into()]
}

#[test]
fn a_session_gets_all_or_none_whatever_happens() {
    let mut granted = 0;
    for world in worlds() {
        for (limit, droppable) in [
            (Some(Duration::ZERO), false),
            (Some(Duration::ZERO), true),
            (Some(Duration::from_millis(90)), false),
            (None, true),
        ] {
            let ask = ask(keys(), limit, droppable);
            let acquire = || Postgres::acquire(&ask, OUTSIDE).expect("valid keys");
            let count = explore(
                &Server,
                &world,
                acquire,
                droppable,
                session_has_all,
                |hold, now| {
                    released(&hold, now);
                    drop(hold);
                },
            );
            granted += count.granted;
            assert!(count.failed > 3, "{count:?}");
        }
    }
    assert!(granted > 50, "{granted}");
}

/// What the guard does without waiting gives back each once.
fn released(hold: &Hold<<Postgres as Dialect>::Key>, world: &World) {
    let parting = Postgres::part(hold, Some(OUTSIDE));
    assert!(!parting.broken);
    let message = parting.message.expect("a message");
    assert_eq!(
        list(between(&message, "unnest('", "'::bigint[]")),
        [0, 1, 2]
    );
    assert!(message.contains("pg_advisory_unlock") && world.holds.iter().all(|holds| *holds > 0));
}

#[test]
fn a_release_names_the_first_that_was_lost_and_releases_the_others() {
    for lost in 0..=KEYS {
        for droppable in [false, true] {
            let ask = ask(keys(), Some(Duration::ZERO), droppable);
            let mut world = World::default();
            let acquire = Postgres::acquire(&ask, OUTSIDE).expect("valid keys");
            let hold = play(&Server, &mut world, acquire)
                .expect("free")
                .expect("free");
            assert!(play(&Server, &mut world, Postgres::is_held(&hold)).is_ok());
            if lost < KEYS {
                world.holds[lost] = 0;
            }
            let result = play(&Server, &mut world, Postgres::release(hold, OUTSIDE));
            assert_eq!(world.holds, [0; KEYS]);
            match lost {
                KEYS => assert_eq!(result, Ok(())),
                lost => {
                    let failure = result.expect_err("one was lost");
                    assert_eq!(failure.reason, Reason::NotHeld);
                    assert_eq!(failure.key.as_deref(), Some(&keys()[lost]));
                }
            }
        }
    }
}

#[test]
fn more_than_250_are_refused_and_so_are_none() {
    let many = |count: i64| dlock_core::proto::Ask::all((0..count).map(LockKey::from));
    assert!(Postgres::acquire(&many(250), OUTSIDE).is_ok());
    for count in [251, 5_000] {
        let failure = Postgres::acquire(&many(count), OUTSIDE)
            .map(drop)
            .expect_err("too many");
        assert_eq!(failure.reason, Reason::TooManyLocks);
    }
    let failure = Postgres::acquire(&many(0), OUTSIDE)
        .map(drop)
        .expect_err("none");
    assert!(matches!(failure.reason, Reason::InvalidKey(_)));
}

#[test]
fn the_texts_are_the_same_for_any_number_of_keys() {
    let text = |count: i64| {
        let ask = dlock_core::proto::Ask::all((0..count).map(LockKey::from));
        let mut acquire = Postgres::acquire(&ask, OUTSIDE).expect("valid keys");
        match Machine::start(&mut acquire, Duration::ZERO) {
            Step::Query(statement) => statement.text(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(text(2), text(250));
}

#[test]
fn a_standby_takes_none() {
    for droppable in [false, true] {
        let ask = ask(keys(), Some(Duration::ZERO), droppable);
        let mut acquire = Postgres::acquire(&ask, OUTSIDE).expect("valid keys");
        let step = Machine::start(&mut acquire, Duration::ZERO);
        let Step::Query(statement) = &step else {
            panic!("{step:?}")
        };
        assert!(
            statement
                .text()
                .contains("WHEN (pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN -3 ELSE")
        );
        let step = Machine::next(&mut acquire, number(3), Duration::ZERO);
        let Step::Done(Err(failure)) = step else {
            panic!("{step:?}")
        };
        assert_eq!(failure.reason, Reason::Standby);
        assert_eq!(failure.aftermath, Aftermath::Clean);
    }
}

/// YugabyteDB up to 2024 refuses a lock as if the table of locks were full.
#[test]
fn another_engine_has_no_such_locks() {
    for (version, reason) in [
        ("PostgreSQL 11.2-YB-2.20.1.0-b0", Reason::Unsupported),
        (
            "PostgreSQL 17.2 on x86_64-pc-linux-gnu",
            Reason::TooManyLocks,
        ),
    ] {
        let ask = ask(keys(), Some(Duration::ZERO), false);
        let mut acquire = Postgres::acquire(&ask, OUTSIDE).expect("valid keys");
        let now = Duration::ZERO;
        Machine::start(&mut acquire, now);
        let full = ErrorFields {
            hint: true,
            ..ErrorFields::default()
        };
        Machine::next(&mut acquire, Answer::Error(full), now);
        let held = Answer::Rows(Rows::Pair(Some(0), Some(1)));
        Machine::next(&mut acquire, held, now);
        let step = Machine::next(&mut acquire, Answer::Rows(Rows::Text(version.into())), now);
        let Step::Done(Err(failure)) = step else {
            panic!("{step:?}")
        };
        assert_eq!(failure.reason, reason);
    }
}
