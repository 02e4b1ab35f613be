//! A lock that ends with the open transaction.

use dlock_core::proto::{Abandoned, Machine, Postgres, Prepared, Reason, TransactionDialect, Wait};

use crate::common::*;
use crate::postgres_server::Does::{self, *};
use crate::postgres_server::Scope;
use crate::script::*;

fn acquire(wait: Wait) -> Script<impl Machine<Output = Option<()>>> {
    play(Postgres::acquire_in_transaction(leak(droppable(wait)), INSIDE).unwrap())
}

fn waits(millis: u32) -> [Does; 5] {
    [
        savepoint(),
        Limits {
            millis,
            transaction: false,
        },
        Wait(Scope::Transaction),
        PutBack { transaction: false },
        gone_savepoint(),
    ]
}

fn undoes() -> [Does; 2] {
    [back(), gone_savepoint()]
}

mod asking {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_statement_and_no_savepoint() {
        for wait in [FOREVER, TRY, limit(millis(250)), poll(None)] {
            acquire(wait)
                .sends([TryInTransaction])
                .kept_as(Prepared::ByText)
                .answer(value(1))
                .holds();
        }
    }

    /// And what it changes it puts back: the transaction goes on.
    #[test]
    fn a_taken_lock_is_waited_for_behind_a_savepoint_that_goes() {
        acquire(FOREVER)
            .answer(value(0))
            .sends(waits(900))
            .answer(DONE)
            .holds();
        acquire(limit(millis(250)))
            .at(millis(100))
            .answer(value(0))
            .sends(waits(150))
            .answer(DONE)
            .holds();
    }

    #[test]
    fn a_try_gives_up_at_once() {
        acquire(TRY).answer(value(0)).gave_up();
    }

    #[test]
    fn polling_never_waits_in_the_queue() {
        acquire(poll(None))
            .answer(value(0))
            .sleep(millis(50))
            .answer(DONE)
            .sends([TryInTransaction])
            .answer(value(1))
            .holds();
    }

    #[test]
    fn at_the_limit_it_gives_up() {
        acquire(limit(millis(250)))
            .answer(value(0))
            .times_out(250)
            .sends(undoes())
            .answer(DONE)
            .gave_up();
    }

    #[test]
    fn without_plpgsql_it_waits_as_before() {
        acquire(FOREVER)
            .answer(value(0))
            .times_out(900)
            .answer(DONE)
            .answer(value(-900))
            .sends(waits(900));
    }
}

mod failing {
    use super::*;

    #[test]
    fn a_try_that_fails_has_aborted_the_transaction() {
        for (answer, reason) in [
            (plain(), Reason::Database),
            (unknown_function(), Reason::Unsupported),
            (out_of_memory(), Reason::TooManyLocks),
        ] {
            acquire(FOREVER)
                .answer(answer)
                .failed(clean(reason).because());
        }
        acquire(FOREVER).answer(lost()).failed(gone());
    }

    #[test]
    fn an_answer_of_another_kind_ends_the_session() {
        for strange in [NULL, value(7), DONE] {
            acquire(FOREVER)
                .answer(strange)
                .failed(broken(Reason::Database));
        }
    }

    #[test]
    fn a_wait_that_fails_is_undone_and_the_transaction_goes_on() {
        for (answer, reason) in [
            (plain(), Reason::Interrupted),
            (deadlock(), Reason::Deadlock),
            (out_of_memory(), Reason::TooManyLocks),
            (unknown_function(), Reason::Unsupported),
            (detail("A detail."), Reason::Database),
        ] {
            let undoing = || {
                acquire(FOREVER)
                    .answer(value(0))
                    .answer(answer.clone())
                    .sends(undoes())
            };
            undoing().answer(DONE).failed_as(clean(reason.clone()));
            undoing()
                .answer(plain())
                .sends(undoes())
                .answer(DONE)
                .failed_as(clean(reason.clone()));
        }
    }

    #[test]
    fn what_cannot_be_undone_is_aborted() {
        let stuck = |answer| {
            acquire(FOREVER)
                .answer(value(0))
                .answer(plain())
                .answer(plain())
                .answer(answer)
        };
        stuck(plain()).failed(clean(Reason::Database).because());
        stuck(lost()).failed(gone());
    }

    #[test]
    fn a_deadlock_with_a_session_that_waits_for_this_transaction_to_end_is_one() {
        acquire(FOREVER)
            .answer(value(0))
            .answer(held_up())
            .answer(DONE)
            .failed(clean(Reason::Deadlock).because());
    }

    #[test]
    fn a_quiet_turn_that_fails_is_undone() {
        let second = || {
            acquire(FOREVER)
                .answer(value(0))
                .times_out(900)
                .answer(DONE)
        };
        second()
            .answer(plain())
            .failed(clean(Reason::Database).because());
        let waiting = || second().answer(value(900));
        // Its own end is no error.
        waiting()
            .times_out(900)
            .sends(undoes())
            .answer(DONE)
            .failed(clean(Reason::Interrupted).because());
        // What the transaction holds goes with it.
        waiting()
            .answer(DONE)
            .answer(plain())
            .failed(clean(Reason::Database).because());
        for strange in [NULL, DONE] {
            second().answer(strange).failed(broken(Reason::Database));
        }
    }
}

mod abandoned {
    use super::*;

    /// What was granted ends with the transaction.
    #[test]
    fn a_try_leaves_nothing() {
        assert_eq!(acquire(FOREVER).abandoned(), Abandoned::default());
        let sleeping = acquire(poll(None)).answer(value(0));
        assert_eq!(sleeping.abandoned(), Abandoned::default());
    }

    #[test]
    fn a_wait_is_cancelled_and_leaves_the_connection_broken() {
        let waiting = acquire(FOREVER).answer(value(0));
        let broken = |cancel| Abandoned {
            messages: vec![],
            broken: true,
            cancel,
            ..Abandoned::default()
        };
        assert_eq!(waiting.abandoned(), broken(true));
        let undoing = waiting.times_out(900);
        assert_eq!(undoing.abandoned(), broken(false));
        let preparing = undoing.answer(DONE);
        assert_eq!(preparing.abandoned(), broken(false));
        let turning = preparing.answer(value(900));
        assert_eq!(turning.abandoned(), broken(true));
        assert_eq!(turning.answer(DONE).abandoned(), broken(false));
    }
}
