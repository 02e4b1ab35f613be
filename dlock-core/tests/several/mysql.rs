use std::fmt::Debug;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{
    Aftermath, Answer, Bind, Columns, Dialect, ErrorFields, Hold, Machine, Mysql, Reason, Rows,
    Statement, Step,
};

use crate::walk::*;

/// Names a, b and c.
struct Server;

const BASE: i64 = 4_611_686_018_427_387_904;

fn number(number: i64) -> Answer {
    Answer::Rows(Rows::Number(Some(number)))
}

fn list(json: &[u8]) -> Vec<usize> {
    let letters = json.iter().filter(|byte| byte.is_ascii_lowercase());
    letters.map(|letter| usize::from(letter - b'a')).collect()
}

fn hex(message: &str) -> Vec<usize> {
    let (_, rest) = message.split_once("x'").expect("a literal");
    let digits = rest.split('\'').next().expect("a literal");
    let bytes = (0..digits.len()).step_by(2);
    let bytes: Vec<u8> = bytes
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex"))
        .collect();
    list(&bytes)
}

fn first_number(message: &str) -> i64 {
    let (_, rest) = message.split_once("<=> ").expect("a number");
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

fn big(bind: &Bind) -> i64 {
    match bind {
        Bind::BigInt(number) => *number,
        Bind::Integer(number) => (*number).into(),
        other => panic!("{other:?}"),
    }
}

fn bytes(bind: &Bind) -> Vec<usize> {
    match bind {
        Bind::Binary(json) => list(json),
        other => panic!("{other:?}"),
    }
}

impl Server {
    fn take_all(world: &World, keys: &[usize], tag: i64, rows: bool) -> Vec<Outcome> {
        assert!(keys.is_sorted(), "{keys:?}");
        let mut next = world.clone();
        let mut outcomes = vec![fault(world.clone())];
        (next.mark, next.got) = (tag, 0);
        outcomes.push(fault(next.clone()));
        for (place, key) in keys.iter().enumerate() {
            if world.taken[*key] {
                let answer = match rows {
                    true => BASE + tag + place as i64 + 1,
                    false => 1,
                };
                outcomes.insert(0, fine(number(answer), next));
                return outcomes;
            }
            next.holds[*key] += 1;
            next.got += 1;
            outcomes.push(fault(next.clone()));
        }
        let answer = if rows { BASE + tag } else { 0 };
        outcomes.insert(0, fine(number(answer), next));
        outcomes
    }

    fn release_all(world: &World, keys: &[usize], tag: Option<i64>) -> Vec<Outcome> {
        let mut next = world.clone();
        let mut lost = 0;
        let mut outcomes = vec![fault(world.clone())];
        for (place, key) in keys.iter().enumerate() {
            match next.holds[*key] {
                0 if lost == 0 => lost = place as i64 + 1,
                0 => {}
                _ => next.holds[*key] -= 1,
            }
            outcomes.push(fault(next.clone()));
        }
        next.released = lost;
        let answer = match tag {
            Some(tag) => BASE + tag + lost,
            None => i64::from(lost > 0),
        };
        outcomes.insert(0, fine(number(answer), next));
        outcomes
    }

    fn query(world: &World, statement: &Statement) -> (Vec<Outcome>, bool) {
        let text = statement.sql.join("?");
        let binds: Vec<Bind> = statement.binds.iter().cloned().collect();
        let rows = statement.columns != Columns::Affected;
        let both = |answer| vec![fine(answer, world.clone()), fault(world.clone())];
        if text.contains("JSON_TABLE") && text.contains("NOT (GET_LOCK(") {
            let outcomes = match rows {
                true if big(&binds[2]) == 1 => {
                    Self::release_all(world, &bytes(&binds[1]), Some(big(&binds[0])))
                }
                true => Self::take_all(world, &bytes(&binds[1]), big(&binds[0]), true),
                false => Self::take_all(world, &bytes(&binds[0]), big(&binds[1]), false),
            };
            return (outcomes, true);
        }
        if text.contains("JSON_TABLE") && text.contains("RELEASE_LOCK") {
            return (Self::release_all(world, &bytes(&binds[0]), None), true);
        }
        if text.contains("errno") && text.contains("@dlock_got") {
            let got = if world.mark == big(&binds[1]) {
                world.got
            } else {
                0
            };
            let answer = Rows::Pair(Some(1317), Some(BASE + big(&binds[0]) + got));
            return (both(Answer::Rows(answer)), false);
        }
        if text.contains("CAST(@dlock_got") {
            return (both(number(BASE + big(&binds[0]) + world.got)), false);
        }
        if text.contains("CAST(@dlock_lost") {
            return (both(number(BASE + big(&binds[0]) + world.released)), false);
        }
        if text.contains("errno") {
            let key = bytes(&binds[2])[0];
            let held = world.mark == big(&binds[1]) && world.holds[key] > 0;
            let answer = Rows::Pair(Some(1317), Some(BASE + big(&binds[0]) + i64::from(held)));
            return (both(Answer::Rows(answer)), false);
        }
        assert!(text.contains("GET_LOCK"), "{text}");
        let (tag, key) = match rows {
            true => (big(&binds[0]), bytes(&binds[2])[0]),
            false => (big(&binds[0]), bytes(&binds[1])[0]),
        };
        let mut next = world.clone();
        next.mark = tag;
        let granted = !world.taken[key];
        next.holds[key] += u32::from(granted && !(rows && big(&binds[1]) == 1));
        let answer = i64::from(granted) + if rows { BASE + tag } else { 0 };
        (vec![fine(number(answer), next), fault(world.clone())], true)
    }
}

impl super::walk::Server for Server {
    fn receive<T: Debug>(&self, world: &World, step: &Step<T>) -> (Vec<Outcome>, bool) {
        match step {
            Step::Query(statement) => Self::query(world, statement),
            Step::Batch(_) => {
                let done = fine(Answer::Done, world.clone());
                (vec![done, fault(world.clone())], false)
            }
            other => panic!("{other:?}"),
        }
    }

    fn obey(&self, world: &mut World, message: &str) {
        let unlock = |world: &mut World, keys: &[usize]| {
            for key in keys {
                world.holds[*key] = world.holds[*key].saturating_sub(1);
            }
        };
        if !message.contains("@dlock_request") {
            unlock(world, &hex(message));
        } else if world.mark == first_number(message) {
            let keys = hex(message);
            match message.contains("JSON_TABLE") {
                true => unlock(world, &keys[..world.got as usize]),
                false if world.holds[keys[0]] > 0 => unlock(world, &keys[..1]),
                false => return,
            }
            world.mark = 0;
        }
    }
}

fn keys() -> [LockKey; KEYS] {
    ["a".into(), "b".into(), "c".into()]
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
            let acquire = || Mysql::acquire(&ask, OUTSIDE).expect("valid keys");
            let count = explore(
                &Server,
                &world,
                acquire,
                droppable,
                session_has_all,
                |hold, _| {
                    let message = Mysql::part(&hold, Some(OUTSIDE))
                        .message
                        .expect("a message");
                    assert_eq!(hex(&message), [0, 1, 2]);
                },
            );
            granted += count.granted;
            assert!(count.failed > 3, "{count:?}");
        }
    }
    assert!(granted > 50, "{granted}");
}

#[test]
fn a_release_names_the_first_that_was_lost_and_releases_the_others() {
    for lost in 0..=KEYS {
        for droppable in [false, true] {
            let ask = ask(keys(), Some(Duration::ZERO), droppable);
            let mut world = World::default();
            let acquire = Mysql::acquire(&ask, OUTSIDE).expect("valid keys");
            let hold = play(&Server, &mut world, acquire)
                .expect("free")
                .expect("free");
            if lost < KEYS {
                world.holds[lost] = 0;
            }
            let result = play(&Server, &mut world, Mysql::release(hold, OUTSIDE));
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

/// The server does not notice that the connection is closed while there is a message to read.
#[test]
fn a_wait_that_nobody_cancels_has_no_message_behind_it() {
    let mut ask = ask(keys(), None, true);
    ask.wait.poll = None;
    for cancellable in [false, true] {
        ask.cancellable = cancellable;
        let mut world = World::default();
        world.taken[1] = true;
        let mut acquire = Mysql::acquire(&ask, OUTSIDE).expect("valid keys");
        let step = Machine::start(&mut acquire, Duration::ZERO);
        let (mut outcomes, _) = Server::query(
            &world,
            match &step {
                Step::Query(statement) => statement,
                other => panic!("{other:?}"),
            },
        );
        let taken = outcomes.swap_remove(0);
        assert_eq!(taken.world.holds, [1, 0, 0]);
        let _ = Machine::next(&mut acquire, taken.answer, Duration::ZERO);
        let abandoned = Machine::abandon(&acquire);
        assert!(abandoned.broken && abandoned.cancel);
        assert_eq!(abandoned.messages.is_empty(), !cancellable);
    }
}

/// A conversation that asks for three names, up to its second answer about an error.
fn after_errno(
    droppable: bool,
    errno: i64,
) -> (
    impl Machine<Output = Option<Hold<String>>>,
    Step<Option<Hold<String>>>,
) {
    let ask = Box::leak(Box::new(ask(keys(), Some(Duration::ZERO), droppable)));
    let mut acquire = Mysql::acquire(ask, OUTSIDE).expect("valid keys");
    let now = Duration::ZERO;
    let first = acquire.start(now);
    assert!(
        query(&first)
            .sql
            .concat()
            .contains("@dlock_one_node IS NULL, REPEAT('-', 999), k.name)")
    );
    acquire.next(Answer::Error(ErrorFields::default()), now);
    let examine = acquire.next(Answer::Done, now);
    let tag = query(&examine).binds.iter().next().map(big).expect("a tag");
    let answer = Rows::Pair(Some(errno), Some(BASE + tag));
    let step = acquire.next(Answer::Rows(answer), now);
    (acquire, step)
}

fn query<T: Debug>(step: &Step<T>) -> &Statement {
    match step {
        Step::Query(statement) => statement,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_node_of_a_galera_cluster_takes_none() {
    for droppable in [false, true] {
        let (_, step) = after_errno(droppable, 1059);
        let Step::Done(Err(failure)) = step else {
            panic!("{step:?}")
        };
        assert_eq!(failure.reason, Reason::Cluster);
        assert_eq!(failure.aftermath, Aftermath::Clean);
    }
}

#[test]
fn one_of_several_mysql_writers_takes_none_and_another_is_asked_again() {
    for droppable in [false, true] {
        for several in [1, 0] {
            let (mut acquire, step) = after_errno(droppable, 4163);
            let question = query(&step);
            assert!(question.text().contains("global_variables"), "{question:?}");
            let tag = question.binds.iter().next().map(big).expect("a tag");
            let answer = Rows::Number(Some(BASE + tag + several));
            let step = acquire.next(Answer::Rows(answer), Duration::ZERO);
            match (several, step) {
                (1, Step::Done(Err(failure))) => {
                    assert_eq!(failure.reason, Reason::Cluster);
                    assert_eq!(failure.aftermath, Aftermath::Clean);
                }
                (0, step) => assert!(query(&step).text().contains("k.name), 0)")),
                (_, step) => panic!("{step:?}"),
            }
        }
    }
}

/// What was taken without that question is not released by a statement that asks it.
#[test]
fn a_server_that_knows_nothing_of_clusters_is_asked_without_that_question() {
    for droppable in [false, true] {
        let (mut acquire, step) = after_errno(droppable, 1193);
        let again = query(&step);
        let text = again.sql.concat();
        assert!(
            text.contains("GET_LOCK(k.name, 0)") && !text.contains("wsrep_on"),
            "{text}"
        );
        let mut world = World::default();
        let (mut outcomes, _) = Server::query(&world, again);
        let granted = outcomes.swap_remove(0);
        world = granted.world;
        let Step::Done(Ok(Some(hold))) = acquire.next(granted.answer, Duration::ZERO) else {
            panic!("not granted")
        };
        let release = Mysql::release(hold, OUTSIDE).start(Duration::ZERO);
        assert!(!query(&release).sql.concat().contains("wsrep_on"));
        let (mut outcomes, _) = Server::query(&world, query(&release));
        assert_eq!(outcomes.swap_remove(0).world.holds, [0; KEYS]);
    }
}

#[test]
fn an_engine_that_answers_nothing_about_it_has_no_such_locks() {
    for (answer, reason) in [
        (Answer::Done, Reason::Unsupported),
        (Answer::Error(ErrorFields::default()), Reason::Lost),
    ] {
        let ask = ask(keys(), Some(Duration::ZERO), false);
        let mut acquire = Mysql::acquire(&ask, OUTSIDE).expect("valid keys");
        let now = Duration::ZERO;
        acquire.start(now);
        for _ in 0..3 {
            acquire.next(Answer::Error(ErrorFields::default()), now);
        }
        let step = acquire.next(answer, now);
        let Step::Done(Err(failure)) = step else {
            panic!("{step:?}")
        };
        assert_eq!(failure.reason, reason);
    }
}
