use std::fmt::Debug;
use std::time::Duration;

use dlock_core::LockKey;
use dlock_core::proto::{Answer, Bind, Dialect, ErrorFields, Reason, Rows, Sqlite, Step};

use crate::walk::*;

/// Keys 0, 1 and 2.
struct Server;

fn number(number: i64) -> Answer {
    Answer::Rows(Rows::Number(Some(number)))
}

fn give_up(world: &mut World, request: i64) {
    if let Some(at) = world.requests.iter().position(|(_, id)| *id == request) {
        let (key, _) = world.requests.swap_remove(at);
        world.holds[key] -= 1;
    }
}

impl super::walk::Server for Server {
    fn receive<T: Debug>(&self, world: &World, step: &Step<T>) -> (Vec<Outcome>, bool) {
        let Step::Query(statement) = step else {
            panic!("{step:?}")
        };
        let text = statement.sql.concat();
        let binds: Vec<i64> = statement
            .binds
            .iter()
            .map(|bind| match bind {
                Bind::BigInt(number) => *number,
                other => panic!("{other:?}"),
            })
            .collect();
        let key = usize::try_from(binds[0]).expect("a key");
        let request = *binds.last().expect("a request");
        let mut next = world.clone();
        // The driver gives the request up if the statement fails.
        let mut failed = world.clone();
        give_up(&mut failed, request);
        let fault = Outcome {
            answer: Answer::Error(ErrorFields {
                given_up: world.requests.iter().any(|(_, id)| *id == request),
                ..ErrorFields::default()
            }),
            world: failed,
            fault: true,
        };
        if text.contains("dlock_acquire") {
            if world.taken[key] {
                return (vec![fine(number(0), next), fault], true);
            }
            next.holds[key] += 1;
            next.requests.push((key, request));
            return (vec![fine(number(1), next), fault], true);
        }
        assert!(text.contains("dlock_release"), "{text}");
        let held = world.requests.contains(&(key, request));
        give_up(&mut next, request);
        (vec![fine(number(held.into()), next), fault], true)
    }

    fn obey(&self, _world: &mut World, message: &str) {
        panic!("{message}")
    }

    fn give_up(&self, world: &mut World, request: i64) {
        give_up(world, request);
    }
}

fn keys() -> [LockKey; KEYS] {
    [0.into(), 1.into(), 2.into()]
}

#[test]
fn a_session_gets_all_or_none_whatever_happens() {
    let mut granted = 0;
    for mut world in worlds() {
        for (key, holds) in world.holds.into_iter().enumerate() {
            if holds > 0 {
                world.requests.push((key, -1));
            }
        }
        for (limit, droppable) in [
            (Some(Duration::ZERO), false),
            (Some(Duration::ZERO), true),
            (Some(Duration::from_millis(90)), false),
            (None, true),
        ] {
            let ask = ask(keys(), limit, droppable);
            let acquire = || Sqlite::acquire(&ask, OUTSIDE).expect("valid keys");
            let count = explore(
                &Server,
                &world,
                acquire,
                droppable,
                session_has_all,
                |hold, now| {
                    let requests: Vec<_> =
                        Sqlite::requests(&hold).map(|request| request.0).collect();
                    assert_eq!(requests.len(), KEYS);
                    let mut after = now.clone();
                    requests
                        .into_iter()
                        .for_each(|request| give_up(&mut after, request));
                    assert_eq!(after.holds, now.holds.map(|holds| holds - 1));
                    let parting = Sqlite::part(&hold, Some(OUTSIDE));
                    assert_eq!(
                        parting.request.iter().count() + parting.more_requests.len(),
                        KEYS
                    );
                },
            );
            granted += count.granted;
        }
    }
    assert!(granted > 50, "{granted}");
}

#[test]
fn a_release_names_the_one_that_was_lost_and_releases_the_others() {
    for lost in 0..KEYS {
        let ask = ask(keys(), Some(Duration::ZERO), false);
        let mut world = World::default();
        let acquire = Sqlite::acquire(&ask, OUTSIDE).expect("valid keys");
        let hold = play(&Server, &mut world, acquire)
            .expect("free")
            .expect("free");
        let (_, request) = world.requests[lost];
        give_up(&mut world, request);
        let failure =
            play(&Server, &mut world, Sqlite::release(hold, OUTSIDE)).expect_err("one was lost");
        assert_eq!(world.holds, [0; KEYS]);
        assert_eq!(failure.reason, Reason::NotHeld);
        assert_eq!(failure.key.as_deref(), Some(&keys()[lost]));
    }
}
