//! The names of savepoints: few, and never two of one name.

use std::collections::BTreeSet;

use dlock_core::proto::{Answer, Dialect, Machine, Postgres, Reason, Step, TransactionDialect};

use crate::common::*;
use crate::script::*;

fn name(text: &str) -> String {
    let (_, rest) = text.split_once("SAVEPOINT ").expect("no savepoint");
    rest.split(';').next().unwrap_or_default().to_owned()
}

/// The name that a conversation has used, when it is over.
fn used<M: Machine<Output: std::fmt::Debug>>(mut script: Script<M>, answers: &[Answer]) -> String {
    let mut used = BTreeSet::new();
    for answer in answers {
        if let Step::Batch(text) = script.step() {
            used.insert(name(text));
        }
        script = script.answer(answer.clone());
    }
    assert_eq!(used.len(), 1, "{used:?}");
    let ended = script.ended();
    // What was acquired is released again.
    drop(ended);
    used.pop_first().unwrap()
}

fn acquire(answers: &[Answer]) -> String {
    used(acquire_as(asked(TRY), INSIDE), answers)
}

fn in_transaction(answers: &[Answer]) -> String {
    let ask = leak(asked(limit(millis(250))));
    used(
        play(Postgres::acquire_in_transaction(ask, INSIDE).unwrap()),
        answers,
    )
}

/// It comes back each time, unless another test has it just then.
#[track_caller]
fn comes_back(name: impl Fn() -> String) {
    let _alone = crate::walk::ALONE.write();
    let names: BTreeSet<_> = (0..300).map(|_| name()).collect();
    assert!(names.len() < 100, "{} names", names.len());
}

#[test]
fn those_that_are_open_differ() {
    let scripts = [(); 3].map(|()| acquire_as(asked(FOREVER), INSIDE));
    let names = scripts.map(|script| {
        let name = name(script.text());
        (name, script.answer(DONE).holds())
    });
    let different: BTreeSet<_> = names.iter().map(|(name, _)| name).collect();
    assert_eq!(different.len(), 3);
}

#[test]
fn one_that_was_undone_comes_back() {
    comes_back(|| acquire(&[token("dlock_taken"), DONE]));
    comes_back(|| acquire(&[deadlock(), DONE]));
    comes_back(|| acquire(&[plain(), DONE, value(0), DONE]));
    comes_back(|| acquire(&[plain(), plain(), DONE, value(0), plain(), DONE]));
    comes_back(|| in_transaction(&[value(0), plain(), DONE]));
    comes_back(|| in_transaction(&[value(0), DONE]));
}

#[test]
fn one_that_was_released_comes_back() {
    comes_back(|| {
        let script = acquire_as(asked(FOREVER), INSIDE);
        let name = name(script.text());
        let hold = script.answer(DONE).holds();
        play(Postgres::release(hold, INSIDE))
            .answer(DONE)
            .answer(value(1))
            .ended()
            .unwrap();
        name
    });
}

#[test]
fn one_that_went_with_its_transaction_comes_back() {
    comes_back(|| {
        let script = acquire_as(asked(FOREVER), INSIDE);
        let name = name(script.text());
        let hold = script.answer(DONE).holds();
        play(Postgres::release(hold, OUTSIDE))
            .answer(value(1))
            .ended()
            .unwrap();
        name
    });
}

/// Its savepoint may be there, if the transaction is aborted: to go back to it would revive the transaction. So it is
/// asked first whether that is so.
#[test]
fn others_come_back_with_a_question() {
    let left: [&dyn Fn() -> String; 4] = [
        // Held, and given up without a release.
        &|| acquire(&[DONE]),
        // Stuck.
        &|| acquire(&[plain(), plain(), plain()]),
        &|| in_transaction(&[value(0), plain(), plain(), plain()]),
        // Released in an aborted transaction, where it stays until the end.
        &|| {
            let script = acquire_as(asked(FOREVER), INSIDE);
            let name = name(script.text());
            let hold = script.answer(DONE).holds();
            play(Postgres::release(hold, INSIDE))
                .answer(plain())
                .answer(token("dlock_released"))
                .ended()
                .unwrap();
            name
        },
    ];
    let _alone = crate::walk::ALONE.write();
    for left in left {
        let left = left();
        // Free names are used first.
        let mut open = Vec::new();
        for _ in 0..200 {
            let script = play(Postgres::acquire(leak(asked(TRY)), INSIDE).unwrap());
            let asks = script.asks_whether_held();
            let script = if asks {
                script.answer(value(0))
            } else {
                script
            };
            if name(script.text()) == left {
                assert!(asks, "{left} is used again");
                break;
            }
            open.push(script);
        }
    }
}

#[test]
fn in_an_aborted_transaction_a_name_that_is_left_over_is_not_sent() {
    let _alone = crate::walk::ALONE.write();
    // Another test may take the name first, or give one back.
    let stale = (0..1_000).find_map(|_| {
        drop(play(Postgres::acquire(leak(asked(TRY)), INSIDE).unwrap()));
        let script = play(Postgres::acquire(leak(asked(TRY)), INSIDE).unwrap());
        if script.asks_whether_held() {
            return Some(script);
        }
        std::mem::forget(script);
        None
    });
    let stale = stale.expect("never asks");
    stale
        .answer(plain())
        .failed(clean(Reason::Database).because());
}

/// What another connection does under that name says nothing of the transaction where its savepoint may be.
#[test]
fn one_that_is_left_over_stays_so_when_another_connection_has_used_it() {
    let _alone = crate::walk::ALONE.write();
    // Another test may take the name first, and keep it.
    let again = (0..20)
        .map(|_| times_used_again(&acquire(&[plain(), plain(), plain()])))
        .max();
    assert_eq!(again, Some(3), "a name that is left over is not used again");
}

/// How often the name is used again, of three times, and each time with a question.
fn times_used_again(left: &str) -> usize {
    // Free names are used first.
    let mut open = Vec::new();
    let mut used = 0;
    while used < 3 && open.len() < 200 {
        let script = play(Postgres::acquire(leak(asked(TRY)), INSIDE).unwrap());
        let asks = script.asks_whether_held();
        let script = if asks {
            script.answer(value(0))
        } else {
            script
        };
        if name(script.text()) == left {
            assert!(asks, "{left} is used again");
            script.answer(token("dlock_taken")).answer(DONE).gave_up();
            used += 1;
        } else {
            open.push(script);
        }
    }
    used
}
