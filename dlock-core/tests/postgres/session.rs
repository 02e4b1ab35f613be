//! A session's lock, outside a transaction.

use std::time::Duration;

use dlock_core::proto::{Abandoned, Answer, Machine, Prepared, Reason};

use crate::common::*;
use crate::postgres_server::Does::{self, *};
use crate::postgres_server::Scope::Session;
use crate::script::*;

fn acquire(wait: dlock_core::proto::Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire_as(asked(wait), OUTSIDE)
}

fn acquire_droppable(wait: dlock_core::proto::Wait) -> Script<impl Machine<Output = Option<Held>>> {
    acquire_as(droppable(wait), OUTSIDE)
}

const LIFTED: bool = true;

fn waits(millis: u32) -> [Does; 3] {
    [
        Limits {
            millis,
            transaction: LIFTED,
        },
        Wait(Session),
        PutBack {
            transaction: LIFTED,
        },
    ]
}

/// Errors that leave it open whether the lock was granted, and their reasons.
fn unclear() -> Vec<(Answer, Reason)> {
    vec![
        (out_of_memory(), Reason::TooManyLocks),
        (unknown_function(), Reason::Unsupported),
        (detail("A detail."), Reason::Database),
    ]
}

mod asking {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_statement() {
        for wait in [FOREVER, TRY, limit(millis(250)), poll(None)] {
            for ask in [asked(wait), droppable(wait)] {
                let hold = acquire_as(ask, OUTSIDE).answer(value(1)).holds();
                assert_eq!(hold.depth(), None);
            }
        }
    }

    #[test]
    fn the_statement_is_kept_under_a_name() {
        acquire(FOREVER).asks(900).kept_as(Prepared::PostgresFirst);
        acquire(limit(millis(250)))
            .asks(250)
            .kept_as(Prepared::PostgresLimited);
        acquire(TRY).asks(0).kept_as(Prepared::PostgresTry);
        acquire_droppable(TRY)
            .asks(0)
            .kept_as(Prepared::PostgresDroppable);
    }

    #[test]
    fn each_request_leaves_a_mark_of_its_own() {
        let mark = |script: Script<_>| match &script.statement().binds.iter().next() {
            Some(dlock_core::proto::Bind::Text(mark)) => mark.clone(),
            other => panic!("{other:?}"),
        };
        let marks = [acquire_droppable(TRY), acquire_droppable(TRY)].map(mark);
        assert_ne!(marks[0], marks[1]);
        assert!(marks.iter().all(|mark| mark.starts_with("0.0")));
    }

    #[test]
    fn a_grant_counts_however_late_it_comes() {
        acquire(limit(millis(250)))
            .at(Duration::MAX)
            .answer(value(1))
            .holds();
    }

    #[test]
    fn a_limit_is_sent_to_the_millisecond_rounded_up() {
        for (limited, sent) in [
            (millis(250), 250),
            (Duration::from_micros(249_001), 250),
            (Duration::from_nanos(1), 1),
            (millis(900), 900),
            (millis(901), 900),
            (Duration::MAX, 900),
        ] {
            acquire(limit(limited)).asks(sent);
            acquire_droppable(limit(limited)).asks(sent);
        }
    }

    #[test]
    fn a_try_gives_up_at_once() {
        acquire(TRY).asks(0).answer(value(0)).gave_up();
    }

    #[test]
    fn polling_sleeps_and_never_waits_in_the_queue() {
        let mut polling = acquire(poll(None));
        for _ in 0..5 {
            polling = polling
                .asks(0)
                .answer(value(0))
                .sleep(millis(50))
                .after(millis(50))
                .answer(DONE);
        }
        polling.asks(0).answer(value(1)).holds();
    }

    #[test]
    fn polling_asks_a_last_time_when_the_limit_is_reached() {
        acquire(poll(Some(millis(80))))
            .answer(value(0))
            .sleep(millis(50))
            .at(millis(50))
            .answer(DONE)
            .asks(0)
            .answer(value(0))
            .sleep(millis(30))
            .at(millis(80))
            .answer(DONE)
            .asks(0)
            .answer(value(0))
            .gave_up();
    }

    /// `transaction_timeout` is armed when the statement begins, so the limits have to be lifted in a message before.
    #[test]
    fn where_a_limit_of_the_user_would_end_the_session_it_waits_in_a_message_of_its_own() {
        acquire(limit(millis(250)))
            .asks(250)
            .answer(value(0))
            .sends(waits(250))
            .answer(DONE)
            .holds();
    }

    /// The message fails there, before it has asked for anything.
    #[test]
    fn on_a_standby_it_does_not_wait() {
        for wait in [FOREVER, limit(millis(250))] {
            for ask in [asked(wait), droppable(wait)] {
                acquire_as(ask, OUTSIDE)
                    .answer(value(0))
                    .answer(token("dlock_standby"))
                    .failed(clean(Reason::Standby).because());
            }
        }
    }

    #[test]
    fn a_wait_that_was_no_prepared_statement_is_only_asked_about() {
        acquire(limit(millis(250)))
            .answer(value(0))
            .times_out(250)
            .sends([IsHeld])
            .kept_as(Prepared::Never)
            .answer(value(0))
            .gave_up();
    }

    #[test]
    fn that_message_leaves_the_mark_too() {
        let waiting = acquire_droppable(FOREVER).answer(value(0));
        let text = waiting.text();
        assert!(text.contains("'dlock.granted'"), "{text}");
        waiting.answer(DONE).holds();
    }
}

mod failing {
    use super::*;

    #[test]
    fn at_the_limit_it_asks_whether_the_lock_was_granted_nevertheless() {
        let after = |answer| {
            acquire(limit(millis(250)))
                .asks(250)
                .times_out(250)
                .sends([Verify])
                .answer(answer)
        };
        after(value(0)).gave_up();
        after(value(1)).failed(broken(Reason::Interrupted).because());
        // Somebody has begun a transaction behind Diesel's back, and this has aborted it.
        let aborted = after(plain()).sends([Version]);
        aborted
            .answer(plain())
            .failed(broken(Reason::InTransaction).because());
        after(lost()).failed(gone());
    }

    #[test]
    fn a_deadlock_leaves_nothing() {
        acquire(FOREVER)
            .answer(deadlock())
            .failed(clean(Reason::Deadlock).because());
        acquire(FOREVER)
            .answer(value(0))
            .answer(deadlock())
            .failed(clean(Reason::Deadlock).because());
    }

    #[test]
    fn with_the_connection_goes_the_lock() {
        acquire(FOREVER).answer(lost()).failed(gone());
        acquire(FOREVER)
            .answer(value(0))
            .answer(lost())
            .failed(gone());
    }

    /// As if the limit had passed, but the wait goes on.
    #[test]
    fn a_session_that_waits_for_this_transaction_to_end_goes_on_when_the_wait_starts_over() {
        acquire(FOREVER)
            .after(millis(1_000))
            .answer(held_up())
            .sends([Verify])
            .answer(value(0))
            .sends([PrepareTurn {
                rest: 60_000,
                long: 1_800,
            }]);
    }

    #[test]
    fn what_an_error_may_have_left_is_asked_for() {
        for (answer, reason) in unclear() {
            let verified = |answer_to_question| {
                acquire(FOREVER)
                    .answer(answer.clone())
                    .sends([Verify])
                    .answer(answer_to_question)
            };
            let not_held = verified(value(0));
            match reason {
                Reason::TooManyLocks => not_held
                    .sends([Version])
                    .answer(version(POSTGRES))
                    .failed_as(clean(reason.clone())),
                _ => not_held.failed_as(clean(reason.clone())),
            }
            verified(value(1)).failed_as(broken(reason.clone()));
            verified(value(3)).failed_as(broken(reason.clone()));
            verified(plain())
                .sends([Version])
                .answer(version(POSTGRES))
                .failed_as(broken(reason.clone()));
            verified(NULL).failed_as(broken(reason.clone()));
            verified(value(2)).asks(900);
            verified(lost()).failed(gone());
        }
    }

    #[test]
    fn after_an_answer_of_another_kind_too() {
        for strange in [NULL, DONE, value(7), value(-1)] {
            acquire(FOREVER)
                .answer(strange)
                .sends([Verify])
                .answer(value(0))
                .failed(clean(Reason::Database));
        }
    }

    #[test]
    fn before_the_limit_it_may_be_a_cancel_or_there_are_no_such_locks() {
        let probed = |answer| {
            acquire(FOREVER)
                .after(millis(20))
                .answer(plain())
                .sends([Verify])
                .answer(value(0))
                .sends([Probe { passed: 20 }])
                .answer(answer)
        };
        probed(value(1)).failed(clean(Reason::Interrupted).because());
        probed(NULL).failed(clean(Reason::Interrupted).because());
        probed(plain()).failed(clean(Reason::Unsupported).because());
        probed(unknown_function()).failed(clean(Reason::Unsupported).because());
        probed(out_of_memory())
            .sends([Version])
            .answer(version(POSTGRES))
            .failed(clean(Reason::TooManyLocks).because());
        probed(lost()).failed(gone());
    }

    #[test]
    fn an_engine_that_answers_with_other_errors_has_no_such_locks() {
        for other in [
            "CockroachDB CCL v24.1.0",
            "PostgreSQL 11.2-YB-2.20.1 on x86_64",
        ] {
            let broken = broken(Reason::Unsupported).because();
            let clean = clean(Reason::Unsupported).because();
            // CockroachDB knows neither the functions nor pg_locks.
            let unknown = || {
                acquire(FOREVER)
                    .answer(plain())
                    .sends([Verify])
                    .answer(plain())
            };
            unknown()
                .sends([Version])
                .answer(version(other))
                .failed(broken.clone());
            let limited = acquire(limit(millis(1))).times_out(1).answer(plain());
            limited
                .sends([Version])
                .answer(version(other))
                .failed(broken);
            // YugabyteDB refuses the lock with a HINT, as PostgreSQL does where its table of locks is full.
            let refused = || acquire(FOREVER).answer(out_of_memory()).answer(value(0));
            refused()
                .sends([Version])
                .answer(version(other))
                .failed(clean);
            unknown().answer(lost()).failed(gone());
            refused()
                .answer(plain())
                .failed(super::clean(Reason::TooManyLocks).because());
        }
    }

    #[test]
    fn a_try_on_a_standby_is_refused_and_nothing_is_asked_of_it() {
        for wait in [TRY, poll(None)] {
            for ask in [asked(wait), droppable(wait)] {
                acquire_as(ask, OUTSIDE)
                    .answer(value(3))
                    .failed(clean(Reason::Standby));
            }
        }
    }

    #[test]
    fn what_statement_timeout_has_cut_short_is_waited_for_without_it() {
        let cut_short = |wait, passed| {
            acquire(wait)
                .after(millis(passed))
                .answer(plain())
                .answer(value(0))
                .answer(value(2))
        };
        cut_short(FOREVER, 100).sends(waits(900));
        cut_short(limit(millis(250)), 100).sends(waits(150));
        // 0 would be no limit.
        cut_short(TRY, 100).sends(waits(1));
        cut_short(poll(None), 100).sends(waits(1));
    }

    #[test]
    fn a_statement_that_the_session_has_forgotten_is_sent_again_once() {
        let again = acquire(FOREVER)
            .kept_as(Prepared::PostgresFirst)
            .answer(plain())
            .sends([Verify])
            .answer(value(2))
            .asks(900)
            .kept_as(Prepared::Never);
        again
            .answer(plain())
            .sends([Verify])
            .answer(value(2))
            .sends([Probe { passed: 0 }]);
    }

    #[test]
    fn what_is_left_after_a_turn_is_its_own_and_is_given_back() {
        let giving_back = |answer| {
            acquire(FOREVER)
                .times_out(900)
                .answer(value(0))
                .answer(value(900))
                .answer(plain())
                .sends([IsHeld])
                .kept_as(Prepared::Never)
                .answer(value(1))
                .sends([Unlock])
                .kept_as(Prepared::Never)
                .answer(answer)
        };
        giving_back(value(1)).failed(clean(Reason::Interrupted).because());
        for unknown in [value(0), NULL, plain()] {
            giving_back(unknown).failed(broken(Reason::Interrupted).because());
        }
        giving_back(lost()).failed(gone());
    }
}

mod abandoned {
    use super::*;

    /// Sent twice, because a late cancel may hit the first.
    #[test]
    fn a_wait_is_cancelled_and_released_by_its_mark() {
        let waiting = acquire_droppable(FOREVER);
        let [Acquire { mark, .. }] = Message::of(waiting.step(), None).unwrap().statements[..]
        else {
            panic!("{:?}", waiting.step())
        };
        let release = vec![NoStatementTimeout, ReleaseIfGranted(mark)];
        assert_eq!(waiting.abandons(), [release.clone(), release]);
        assert!(waiting.abandoned().cancel && waiting.abandoned().broken);

        let waiting = waiting.answer(value(0));
        let left = match Message::of(waiting.step(), None).unwrap().statements[..] {
            [.., LeaveMark(mark)] => mark,
            ref other => panic!("{other:?}"),
        };
        let release = vec![NoStatementTimeout, ReleaseIfGranted(left)];
        assert_eq!(waiting.abandons(), [release.clone(), release]);
        assert!(waiting.abandoned().cancel && waiting.abandoned().broken);
    }

    #[test]
    fn a_try_does_not_wait() {
        let abandoned = acquire_droppable(TRY).abandoned();
        assert!(!abandoned.cancel && abandoned.broken);
        assert_eq!(abandoned.messages.len(), 2);
    }

    #[test]
    fn a_quiet_turn_is_reclaimed() {
        let prepares = acquire_droppable(FOREVER).times_out(900).answer(value(0));
        assert!(!prepares.abandoned().cancel);
        assert!(prepares.abandoned().messages.is_empty());
        let reclaim = vec![NoStatementTimeout, Reclaim];
        let waits = prepares.answer(value(900));
        assert_eq!(waits.abandons(), [reclaim.clone(), reclaim.clone()]);
        assert!(waits.abandoned().cancel && waits.abandoned().broken);
        let reads = waits.answer(DONE);
        assert_eq!(reads.abandons(), [reclaim.clone(), reclaim]);
        assert!(!reads.abandoned().cancel && reads.abandoned().broken);
    }

    #[test]
    fn between_two_polls_there_is_nothing_to_do() {
        let sleeping = acquire_droppable(poll(None)).answer(value(0));
        assert_eq!(sleeping.abandoned(), Abandoned::default());
    }

    #[test]
    fn a_question_after_a_failure_leaves_the_connection_broken() {
        let only_broken = Abandoned {
            broken: true,
            ..Abandoned::default()
        };
        let verifying = acquire_droppable(FOREVER).answer(plain());
        assert_eq!(verifying.abandoned(), only_broken);
        let probing = verifying.answer(value(0));
        assert_eq!(probing.abandoned(), only_broken);
    }

    use crate::postgres_server::Message;
}
