//! A long wait gives up its place and its snapshot, and writes one line into the server's log at most.

use std::time::Duration;

use dlock_core::proto::{Machine, Postgres, Reason, TransactionDialect, Wait};

use crate::common::*;
use crate::postgres_server::Does::{self, *};
use crate::postgres_server::Scope;
use crate::script::*;

fn acquire(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire_as(asked(wait), OUTSIDE)
}

fn prepares(rest: u32, long: u32) -> [Does; 1] {
    [PrepareTurn { rest, long }]
}

fn turns(rest: u32) -> [Does; 4] {
    [
        Limits {
            millis: rest,
            transaction: true,
        },
        WatchClient,
        Turn(Scope::Session),
        PutBack { transaction: true },
    ]
}

/// After the first turn.
fn second_turn(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire(wait).asks(900).times_out(900).answer(value(0))
}

#[test]
fn from_the_second_on_they_are_quiet() {
    let mut waiting = second_turn(FOREVER);
    for _ in 0..20 {
        waiting = waiting
            .answer(value(900))
            .sends(turns(60_000))
            .after(millis(900))
            .answer(DONE)
            .sends([IsHeld])
            .answer(value(0));
    }
    waiting
        .answer(value(900))
        .answer(DONE)
        .sends([IsHeld])
        .answer(value(1))
        .holds();
}

#[test]
fn behind_readers_they_grow_to_a_minute() {
    let mut waiting = second_turn(FOREVER);
    for long in [1_800, 3_600, 7_200, 14_400, 28_800, 57_600, 60_000, 60_000] {
        waiting = waiting
            .sends(prepares(60_000, long))
            .answer(value(long.into()))
            .answer(DONE)
            .answer(value(0));
    }
}

#[test]
fn the_last_one_is_for_what_is_left_of_the_limit() {
    second_turn(limit(millis(2_000)))
        .sends(prepares(1_100, 1_800))
        .answer(value(900))
        .sends(turns(1_100))
        .after(millis(900))
        .answer(DONE)
        .answer(value(0))
        .sends(prepares(200, 3_600))
        .answer(value(200))
        .sends(turns(200))
        .after(millis(200))
        .answer(DONE)
        .answer(value(0))
        .gave_up();
}

#[test]
fn the_server_may_end_one_early_by_a_hair() {
    acquire(limit(millis(250)))
        .times_out(250)
        .answer(value(0))
        .gave_up();
    // By a clock that is 0.2 % slower.
    acquire(FOREVER)
        .at(Duration::from_micros(897_300))
        .answer(plain())
        .answer(value(0))
        .sends(prepares(60_000, 1_800));
    acquire(FOREVER)
        .at(Duration::from_micros(897_000))
        .answer(plain())
        .answer(value(0))
        .sends([Probe { passed: 897 }]);
    second_turn(limit(millis(1_100)))
        .sends(prepares(200, 1_800))
        .answer(value(200))
        .at(millis(1_099))
        .answer(DONE)
        .answer(value(0))
        .sends(prepares(1, 3_600));
}

#[test]
fn a_role_without_plpgsql_waits_by_the_first_statement_again() {
    second_turn(FOREVER)
        .answer(value(-900))
        .asks(900)
        .times_out(900)
        .sends([Verify])
        .answer(value(0))
        .sends(prepares(60_000, 3_600))
        .answer(value(-3_600))
        .asks(3_600);
}

#[test]
fn so_does_one_that_may_be_dropped() {
    acquire_as(droppable(FOREVER), OUTSIDE)
        .times_out(900)
        .answer(value(0))
        .answer(value(-60_000))
        .asks(60_000)
        .times_out(60_000)
        .sends([Verify])
        .answer(value(0))
        .sends(prepares(60_000, 3_600));
}

/// The block catches the end of its turn, so it was something else that ended it, whenever that was.
#[test]
fn an_error_of_a_quiet_one_is_never_its_end() {
    for passed in [20, 900, 60_000] {
        second_turn(FOREVER)
            .answer(value(900))
            .after(millis(passed))
            .answer(plain())
            .sends([IsHeld])
            .answer(value(0))
            .sends([Probe { passed: 0 }])
            .answer(value(1))
            .failed(clean(Reason::Interrupted).because());
    }
}

#[test]
fn every_question_of_a_quiet_one_may_fail() {
    for (answer, reason) in [
        (deadlock(), Reason::Deadlock),
        (lost(), Reason::Lost),
        (out_of_memory(), Reason::TooManyLocks),
    ] {
        let asked = [
            second_turn(FOREVER),
            second_turn(FOREVER).answer(value(900)),
            second_turn(FOREVER).answer(value(900)).answer(DONE),
        ];
        for waiting in asked {
            let failed = waiting.answer(answer.clone());
            match reason {
                Reason::TooManyLocks => failed
                    .sends([IsHeld])
                    .answer(value(0))
                    .answer(version(POSTGRES))
                    .failed_as(clean(reason.clone())),
                Reason::Lost => failed.failed_as(gone()),
                _ => failed.failed_as(clean(reason.clone())),
            }
        }
    }
}

#[test]
fn a_strange_answer_is_looked_into() {
    second_turn(FOREVER)
        .answer(NULL)
        .sends([IsHeld])
        .answer(value(0))
        .failed(clean(Reason::Database));
    second_turn(FOREVER)
        .answer(value(900))
        .answer(value(1))
        .sends([IsHeld]);
    second_turn(FOREVER)
        .answer(value(900))
        .answer(DONE)
        .answer(value(7))
        .sends([IsHeld]);
}

#[test]
fn a_transaction_that_begins_waits_in_the_same_turns() {
    let wait = [
        Does::Begin,
        Does::TellTurn(900),
        Limits {
            millis: 60_000,
            transaction: true,
        },
        WatchClient,
        Turn(Scope::Transaction),
        PutBack { transaction: true },
    ];
    let over = play(Postgres::begin(leak(asked(FOREVER))).unwrap())
        .times_out(900)
        .sends([RollBack])
        .answer(DONE)
        .sends(prepares(60_000, 1_800))
        .answer(value(900))
        .sends(wait)
        .after(millis(900))
        .answer(DONE)
        .sends([IsHeld]);
    over.answer(value(0))
        .sends([RollBack])
        .answer(DONE)
        .sends(prepares(60_000, 3_600))
        .answer(value(900))
        .answer(DONE)
        .answer(value(1))
        .holds();
}

#[test]
fn a_lock_of_the_transaction_is_waited_for_in_the_same_turns() {
    let wait = [
        savepoint(),
        Limits {
            millis: 60_000,
            transaction: false,
        },
        WatchClient,
        Turn(Scope::Transaction),
        PutBack { transaction: false },
        gone_savepoint(),
    ];
    play(Postgres::acquire_in_transaction(leak(asked(FOREVER)), INSIDE).unwrap())
        .answer(value(0))
        .times_out(900)
        .answer(DONE)
        .sends(prepares(60_000, 1_800))
        .answer(value(900))
        .sends(wait)
        .answer(DONE)
        .sends([IsHeld])
        .answer(value(0))
        .sends(prepares(60_000, 3_600));
}

#[test]
fn a_lock_of_the_session_inside_a_transaction_as_well() {
    let wait = [
        savepoint(),
        Limits {
            millis: 60_000,
            transaction: false,
        },
        WatchClient,
        Turn(Scope::Session),
        back(),
        gone_savepoint(),
    ];
    acquire_as(asked(FOREVER), INSIDE)
        .times_out(900)
        .answer(DONE)
        .answer(value(0))
        .sends(prepares(60_000, 1_800))
        .answer(value(900))
        .sends(wait)
        .answer(DONE)
        .sends([IsHeld])
        .answer(value(1))
        .sends([savepoint()])
        .answer(DONE)
        .holds();
}
