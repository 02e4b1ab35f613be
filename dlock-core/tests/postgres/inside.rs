//! A session's lock, inside an open transaction: behind a savepoint, so that the transaction goes on.

use std::time::Duration;

use dlock_core::proto::{Abandoned, Answer, Machine, Prepared, Reason, Wait};

use crate::common::*;
use crate::postgres_server::Does::{self, *};
use crate::postgres_server::Scope;
use crate::script::*;

fn acquire(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire_as(asked(wait), INSIDE)
}

/// After the question whether the session holds the lock.
fn acquire_droppable(wait: Wait, held: i64) -> Script<impl Machine<Output = Option<Held>>> {
    acquire_as(droppable(wait), INSIDE).answer(value(held))
}

fn waits(millis: u32) -> [Does; 4] {
    [
        savepoint(),
        Limits {
            millis,
            transaction: false,
        },
        Wait(Scope::Session),
        back(),
    ]
}

fn tries() -> [Does; 2] {
    [savepoint(), TryOrFail]
}

fn undoes() -> [Does; 2] {
    [back(), gone_savepoint()]
}

/// The first turn has ended.
fn second_turn(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire(wait)
        .times_out(900)
        .sends(undoes())
        .answer(DONE)
        .sends([IsHeld])
        .answer(value(0))
}

mod asking {
    use super::*;

    #[test]
    fn it_waits_in_one_message_behind_a_savepoint_that_stays() {
        for (wait, millis) in [
            (FOREVER, 900),
            (limit(millis(250)), 250),
            (limit(Duration::from_nanos(1)), 1),
        ] {
            let hold = acquire(wait).sends(waits(millis)).answer(DONE).holds();
            assert_eq!(hold.depth(), INSIDE.depth);
        }
    }

    #[test]
    fn a_try_tells_by_a_token_that_the_lock_is_taken() {
        acquire(TRY).sends(tries()).answer(DONE).holds();
        acquire(TRY)
            .answer(token("dlock_taken"))
            .sends(undoes())
            .answer(DONE)
            .gave_up();
        acquire(poll(None))
            .sends(tries())
            .answer(token("dlock_taken"))
            .answer(DONE)
            .sleep(millis(50))
            .answer(DONE)
            .sends(tries());
    }

    /// The server quotes the token in its own language.
    #[test]
    fn in_every_language() {
        for answer in [
            "Token »dlock_taken« ist ungültig.",
            "Le jeton « dlock_taken » n'est pas valide.",
            "El elemento «dlock_taken» no es válido.",
            "კოდი არასწორია: dlock_taken.",
            "令牌 \"dlock_taken\" 无效.",
        ] {
            acquire(TRY).answer(detail(answer)).answer(DONE).gave_up();
        }
    }

    #[test]
    fn a_deeper_transaction_is_kept_in_the_hold() {
        let acquire = acquire_as(asked(FOREVER), at_depth(3));
        assert_eq!(acquire.answer(DONE).holds().depth(), at_depth(3).depth);
    }

    #[test]
    fn what_may_be_dropped_asks_first_whether_the_session_holds_the_lock() {
        for held in [0, 1] {
            acquire_as(droppable(FOREVER), INSIDE)
                .sends([IsHeld])
                .answer(value(held))
                .sends(waits(900))
                .answer(DONE)
                .holds();
        }
        let before = || acquire_as(droppable(FOREVER), INSIDE);
        before()
            .answer(plain())
            .failed(clean(Reason::Database).because());
        before().answer(lost()).failed(gone());
    }

    #[test]
    fn at_the_limit_it_gives_up() {
        acquire(limit(millis(250)))
            .sends(waits(250))
            .times_out(250)
            .sends(undoes())
            .answer(DONE)
            .sends([IsHeld])
            .answer(value(0))
            .gave_up();
    }

    #[test]
    fn after_a_quiet_turn_the_savepoint_is_set_anew() {
        let marks = second_turn(FOREVER)
            .answer(value(900))
            .answer(DONE)
            .answer(value(1))
            .sends([savepoint()]);
        marks.answer(DONE).holds();
    }

    #[test]
    fn without_plpgsql_it_waits_as_before() {
        second_turn(FOREVER).answer(value(-900)).sends(waits(900));
    }
}

mod failing {
    use super::*;

    #[test]
    fn every_error_is_undone_first() {
        for answer in [
            plain(),
            deadlock(),
            held_up(),
            out_of_memory(),
            unknown_function(),
            detail("A detail."),
            token("dlock_taken"),
        ] {
            acquire(FOREVER).answer(answer).sends(undoes());
        }
    }

    #[test]
    fn an_undo_that_a_late_cancel_has_hit_is_sent_again() {
        acquire(TRY)
            .answer(token("dlock_taken"))
            .answer(plain())
            .sends(undoes())
            .answer(DONE)
            .gave_up();
    }

    /// There is no savepoint, so nothing was asked for.
    #[test]
    fn a_transaction_that_had_been_aborted_is_as_before() {
        let stuck = |answer| {
            acquire(FOREVER)
                .answer(answer)
                .answer(plain())
                .answer(plain())
        };
        stuck(plain()).failed(clean(Reason::Database).because());
        stuck(out_of_memory()).failed(clean(Reason::TooManyLocks).because());
    }

    #[test]
    fn with_the_connection_goes_the_lock() {
        acquire(FOREVER).answer(lost()).failed(gone());
        acquire(FOREVER)
            .answer(plain())
            .answer(lost())
            .failed(gone());
        acquire(FOREVER)
            .answer(plain())
            .answer(plain())
            .answer(lost())
            .failed(gone());
        acquire(FOREVER)
            .answer(plain())
            .answer(DONE)
            .answer(lost())
            .failed(gone());
    }

    #[test]
    fn a_deadlock_leaves_nothing() {
        acquire(FOREVER)
            .answer(deadlock())
            .answer(DONE)
            .failed(clean(Reason::Deadlock).because());
    }

    #[test]
    fn what_an_error_may_have_left_is_asked_for() {
        for (answer, reason) in [
            (out_of_memory(), Reason::TooManyLocks),
            (unknown_function(), Reason::Unsupported),
            (detail("A detail."), Reason::Database),
        ] {
            let verified = |answer_to_question| {
                acquire(FOREVER)
                    .answer(answer.clone())
                    .answer(DONE)
                    .sends([IsHeld])
                    .answer(answer_to_question)
            };
            verified(value(0)).failed_as(clean(reason.clone()));
            // By this request, or by an outer guard.
            verified(value(1)).failed_as(broken(reason.clone()));
            verified(NULL).failed_as(broken(reason.clone()));
            verified(plain()).failed_as(broken(reason.clone()));
        }
    }

    #[test]
    fn where_nobody_held_the_lock_before_it_is_given_back() {
        let giving_back = |answer| {
            acquire_droppable(FOREVER, 0)
                .answer(plain())
                .answer(DONE)
                .sends([IsHeld])
                .answer(value(1))
                .sends([Unlock])
                .kept_as(Prepared::PostgresUnlock)
                .answer(answer)
        };
        giving_back(value(1)).failed(clean(Reason::Interrupted).because());
        for unknown in [value(0), NULL, plain()] {
            giving_back(unknown).failed(broken(Reason::Interrupted).because());
        }
        giving_back(lost()).failed(gone());
    }

    #[test]
    fn where_an_outer_guard_holds_it_nobody_can_know() {
        for answer in [plain(), out_of_memory()] {
            acquire_droppable(FOREVER, 1)
                .answer(answer)
                .answer(DONE)
                .failed_as_end();
        }
    }

    #[test]
    fn a_cancel_and_missing_locks_are_told_apart_behind_a_savepoint() {
        let probing = || {
            acquire(FOREVER)
                .answer(plain())
                .answer(DONE)
                .answer(value(0))
                .sends([savepoint(), ProbeInside, back(), gone_savepoint()])
        };
        probing()
            .answer(DONE)
            .failed(clean(Reason::Interrupted).because());
        let undone = |answer: Answer| probing().answer(answer).sends(undoes()).answer(DONE);
        undone(plain()).failed(clean(Reason::Unsupported).because());
        undone(unknown_function()).failed(clean(Reason::Unsupported).because());
        undone(out_of_memory()).failed(clean(Reason::TooManyLocks).because());
        probing()
            .answer(plain())
            .answer(plain())
            .answer(plain())
            .failed(clean(Reason::Database).because());
        probing().answer(lost()).failed(gone());
    }

    #[test]
    fn an_error_of_a_quiet_turn_is_undone() {
        let waiting = second_turn(FOREVER).answer(value(900));
        waiting
            .answer(plain())
            .sends(undoes())
            .answer(DONE)
            .sends([IsHeld])
            .answer(value(1))
            .sends([Unlock]);
    }

    /// Nothing was asked for. The transaction is aborted.
    #[test]
    fn an_error_before_a_quiet_turn_leaves_nothing() {
        second_turn(FOREVER)
            .answer(plain())
            .failed(clean(Reason::Database).because());
    }

    /// The transaction is aborted, and the savepoint had gone: nobody can ask any more.
    #[test]
    fn an_error_after_a_quiet_turn_ends_the_session() {
        let reading = || second_turn(FOREVER).answer(value(900)).answer(DONE);
        reading()
            .answer(plain())
            .failed(broken(Reason::Database).because());
        reading().answer(lost()).failed(gone());
        let marking = || reading().answer(value(1));
        marking()
            .answer(plain())
            .failed(broken(Reason::Database).because());
        marking().answer(lost()).failed(gone());
    }

    trait EndsSession {
        fn failed_as_end(self);
    }

    impl<M: Machine<Output: std::fmt::Debug>> EndsSession for Script<M> {
        #[track_caller]
        fn failed_as_end(self) {
            let failure = self.ended().expect_err("no failure");
            assert_eq!(failure.aftermath, dlock_core::proto::Aftermath::EndSession);
        }
    }
}

mod abandoned {
    use super::*;

    fn only_broken() -> Abandoned {
        Abandoned {
            broken: true,
            ..Abandoned::default()
        }
    }

    #[test]
    fn a_wait_is_cancelled_and_undone_and_reclaimed() {
        let waiting = acquire_droppable(FOREVER, 0);
        let message = vec![back(), Reclaim];
        assert_eq!(waiting.abandons(), [message.clone(), message]);
        assert!(waiting.abandoned().broken && waiting.abandoned().cancel);
    }

    /// If a quiet turn was granted, its savepoint has gone: then the first message releases the lock. Otherwise one of
    /// the others does.
    #[test]
    fn a_quiet_turn_is_reclaimed_with_and_without_its_savepoint() {
        let turning = acquire_droppable(FOREVER, 0)
            .times_out(900)
            .answer(DONE)
            .answer(value(0))
            .answer(value(900));
        let behind = vec![back(), Reclaim];
        assert_eq!(turning.abandons(), [vec![Reclaim], behind.clone(), behind]);
        assert!(turning.abandoned().broken && turning.abandoned().cancel);
    }

    #[test]
    fn a_try_is_not_cancelled() {
        let trying = acquire_droppable(TRY, 0);
        assert_eq!(trying.abandons().len(), 2);
        assert!(trying.abandoned().broken && !trying.abandoned().cancel);
    }

    /// It fails where the wait has failed or was never sent.
    #[test]
    fn what_an_outer_guard_holds_is_released_once_and_only_behind_the_savepoint() {
        let waiting = acquire_droppable(FOREVER, 1);
        assert_eq!(waiting.abandons(), [vec![gone_savepoint(), UnlockAndKeep]]);
        assert!(waiting.abandoned().broken && !waiting.abandoned().cancel);
        let undoing = waiting.answer(plain());
        assert_eq!(undoing.abandoned(), only_broken());
    }

    #[test]
    fn once_the_savepoint_is_gone_the_lock_is_only_reclaimed() {
        let undoing = acquire_droppable(FOREVER, 0).answer(plain());
        let reclaims = [vec![Reclaim], vec![Reclaim]];
        assert_eq!(undoing.abandons(), reclaims);
        let verifying = undoing.answer(DONE);
        assert_eq!(verifying.abandons(), reclaims);
        assert!(!verifying.abandoned().cancel);
    }

    #[test]
    fn before_and_between_there_is_nothing_to_do() {
        let before = acquire_as(droppable(FOREVER), INSIDE);
        assert_eq!(before.abandoned(), Abandoned::default());
        let sleeping = acquire_droppable(poll(None), 0)
            .answer(token("dlock_taken"))
            .answer(DONE);
        assert_eq!(sleeping.abandoned(), Abandoned::default());
    }
}
