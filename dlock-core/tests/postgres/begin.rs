//! A transaction that begins with a lock, and whose snapshot is younger than the grant.

use dlock_core::proto::{
    Abandoned, Answer, Machine, Postgres, Prepared, Reason, TransactionDialect, Wait,
};

use crate::common::*;
use crate::postgres_server::Does::{self, *};
use crate::postgres_server::Scope;
use crate::script::*;

fn begin(wait: Wait) -> Script<impl Machine<Output = Option<()>>> {
    play(Postgres::begin(leak(droppable(wait))).unwrap())
}

fn begins(millis: u32) -> [Does; 2] {
    [Begin, BeginOrWait { millis }]
}

fn waits(millis: u32) -> [Does; 4] {
    [
        Begin,
        Limits {
            millis,
            transaction: true,
        },
        Does::Wait(Scope::Transaction),
        PutBack { transaction: true },
    ]
}

fn isolated(millis: u32) -> [Does; 6] {
    [
        RollBack,
        Begin,
        LimitsOf(millis),
        Does::Wait(Scope::Session),
        Commit,
        HandOver,
    ]
}

mod at_read_committed {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_message() {
        for (wait, millis) in [
            (FOREVER, 900),
            (TRY, 0),
            (limit(millis(250)), 250),
            (poll(None), 0),
        ] {
            begin(wait).sends(begins(millis)).answer(DONE).holds();
        }
    }

    #[test]
    fn a_try_tells_by_a_token_that_the_lock_is_taken() {
        begin(TRY)
            .answer(token("dlock_taken"))
            .sends([RollBack])
            .answer(DONE)
            .gave_up();
        begin(poll(None))
            .answer(token("dlock_taken"))
            .answer(DONE)
            .sleep(millis(50))
            .answer(DONE)
            .sends(begins(0));
    }

    #[test]
    fn at_the_limit_it_gives_up() {
        begin(limit(millis(250)))
            .sends(begins(250))
            .times_out(250)
            .sends([RollBack])
            .answer(DONE)
            .gave_up();
    }

    #[test]
    fn without_plpgsql_it_waits_in_a_message_of_its_own() {
        begin(FOREVER)
            .times_out(900)
            .answer(DONE)
            .answer(value(-900))
            .sends(waits(900))
            .answer(DONE)
            .holds();
    }

    /// `transaction_timeout` is armed when the transaction begins.
    #[test]
    fn where_a_limit_of_the_user_would_end_the_session_it_waits_in_a_message_of_its_own() {
        begin(limit(millis(250)))
            .answer(token("dlock_cut_short"))
            .sends([RollBack])
            .answer(DONE)
            .sends(waits(250))
            .answer(DONE)
            .holds();
    }

    #[test]
    fn what_statement_timeout_has_cut_short_is_waited_for_without_it() {
        let cut_short = |wait, passed| {
            begin(wait)
                .after(millis(passed))
                .answer(plain())
                .answer(DONE)
                .answer(value(2))
        };
        cut_short(FOREVER, 100).sends(waits(900));
        cut_short(limit(millis(250)), 100).sends(waits(150));
        cut_short(poll(None), 100).sends(waits(1));
    }
}

mod at_other_levels {
    use super::*;

    const LEVELS: [&str; 3] = ["repeatable", "serializable", "read"];

    #[test]
    fn the_sessions_lock_is_taken_first_and_handed_over() {
        for level in LEVELS {
            begin(FOREVER)
                .answer(token(level))
                .sends(isolated(900))
                .answer(DONE)
                .holds();
        }
        begin(limit(millis(250)))
            .at(millis(10))
            .answer(token("serializable"))
            .sends(isolated(240));
    }

    #[test]
    fn in_every_language() {
        for answer in [
            "Token »serializable« ist ungültig.",
            "Le jeton « repeatable » n'est pas valide.",
        ] {
            begin(FOREVER).answer(detail(answer)).sends(isolated(900));
        }
    }

    #[test]
    fn a_try_takes_the_sessions_lock_without_a_wait() {
        let trying = || {
            begin(TRY)
                .answer(token("repeatable"))
                .sends([RollBack])
                .answer(DONE)
                .asks(0)
        };
        trying().answer(value(0)).gave_up();
        trying()
            .answer(value(1))
            .sends([Begin, HandOver])
            .answer(DONE)
            .holds();
    }

    #[test]
    fn at_the_limit_it_asks_what_the_session_holds() {
        let after = |wait, passed, answer| {
            begin(wait)
                .answer(token("repeatable"))
                .times_out(passed)
                .sends([RollBack])
                .answer(DONE)
                .sends([IsHeld])
                .kept_as(Prepared::Never)
                .answer(answer)
        };
        // The first turn has passed.
        after(FOREVER, 900, value(0)).sends([PrepareTurn {
            rest: 60_000,
            long: 1_800,
        }]);
        after(limit(millis(250)), 250, value(0)).gave_up();
        after(FOREVER, 900, value(1)).failed(broken(Reason::Interrupted).because());
        after(FOREVER, 20, value(0)).failed(clean(Reason::Interrupted).because());
        after(FOREVER, 20, value(1)).failed(broken(Reason::Interrupted).because());
        after(FOREVER, 20, plain()).failed(broken(Reason::Interrupted).because());
        after(FOREVER, 20, lost()).failed(gone());
    }

    #[test]
    fn other_errors_are_rolled_back_first() {
        for (answer, reason) in [
            (out_of_memory(), Reason::TooManyLocks),
            (unknown_function(), Reason::Unsupported),
            (detail("A detail."), Reason::Database),
        ] {
            begin(FOREVER)
                .answer(token("repeatable"))
                .answer(answer)
                .sends([RollBack])
                .answer(DONE)
                .sends([IsHeld])
                .answer(value(0))
                .failed(clean(reason).because());
        }
        begin(FOREVER)
            .answer(token("repeatable"))
            .answer(deadlock())
            .answer(DONE)
            .failed(clean(Reason::Deadlock).because());
        begin(FOREVER)
            .answer(token("repeatable"))
            .answer(lost())
            .failed(gone());
    }

    #[test]
    fn a_hand_over_that_fails_ends_the_session() {
        let handing_over = || {
            begin(TRY)
                .answer(token("repeatable"))
                .answer(DONE)
                .answer(value(1))
        };
        handing_over()
            .answer(plain())
            .failed(broken(Reason::Database).because());
        handing_over().answer(lost()).failed(gone());
    }

    #[test]
    fn what_fails_before_the_hand_over_is_the_sessions_failure() {
        begin(TRY)
            .answer(token("repeatable"))
            .answer(DONE)
            .answer(deadlock())
            .failed(clean(Reason::Deadlock).because());
    }
}

mod failing {
    use super::*;

    #[test]
    fn every_error_is_rolled_back_first() {
        for (answer, reason) in [
            (deadlock(), Reason::Deadlock),
            (out_of_memory(), Reason::TooManyLocks),
            (unknown_function(), Reason::Unsupported),
            (detail("A detail."), Reason::Database),
        ] {
            let failed = || begin(FOREVER).answer(answer.clone()).sends([RollBack]);
            let rolled_back = failed().answer(DONE);
            match reason {
                Reason::TooManyLocks => {
                    let asked = || failed().answer(DONE).sends([Version]);
                    asked()
                        .answer(version(POSTGRES))
                        .failed_as(clean(reason.clone()));
                    asked()
                        .answer(version("YB"))
                        .failed_as(clean(Reason::Unsupported));
                }
                _ => rolled_back.failed_as(clean(reason.clone())),
            }
            failed()
                .answer(plain())
                .failed(broken(Reason::Database).because());
            failed().answer(lost()).failed(gone());
        }
        begin(FOREVER).answer(lost()).failed(gone());
    }

    #[test]
    fn a_cancel_and_missing_locks_are_told_apart() {
        let probed = |answer: Answer| {
            begin(FOREVER)
                .after(millis(20))
                .answer(plain())
                .answer(DONE)
                .sends([Probe { passed: 20 }])
                .answer(answer)
        };
        probed(value(1)).failed(clean(Reason::Interrupted).because());
        probed(plain()).failed(clean(Reason::Unsupported).because());
        let full = || probed(out_of_memory()).sends([Version]);
        full()
            .answer(version(POSTGRES))
            .failed(clean(Reason::TooManyLocks).because());
        full()
            .answer(version("CockroachDB CCL v24.1.0"))
            .failed(clean(Reason::Unsupported).because());
        probed(lost()).failed(gone());
    }

    #[test]
    fn a_session_that_waits_for_this_transaction_to_end_goes_on_when_the_wait_starts_over() {
        begin(FOREVER)
            .answer(held_up())
            .answer(DONE)
            .sends([PrepareTurn {
                rest: 60_000,
                long: 1_800,
            }]);
    }

    #[test]
    fn a_quiet_turn_that_fails_is_rolled_back() {
        let second = || begin(FOREVER).times_out(900).answer(DONE);
        second().answer(plain()).sends([RollBack]);
        let waiting = || second().answer(value(900));
        waiting()
            .times_out(900)
            .sends([RollBack])
            .answer(DONE)
            .sends([Probe { passed: 0 }]);
        waiting().answer(DONE).answer(plain()).sends([RollBack]);
        second()
            .answer(NULL)
            .sends([RollBack])
            .answer(DONE)
            .failed(clean(Reason::Database));
    }

    #[test]
    fn an_answer_of_another_kind_ends_the_session() {
        for strange in [NULL, value(1)] {
            begin(FOREVER)
                .answer(strange.clone())
                .failed(broken(Reason::Database));
            begin(FOREVER)
                .answer(plain())
                .answer(strange)
                .failed(broken(Reason::Database));
        }
    }
}

mod abandoned {
    use super::*;

    fn rolls_back(broken: bool, cancel: bool) -> Abandoned {
        Abandoned {
            messages: vec!["ROLLBACK".into(), "ROLLBACK".into()],
            broken,
            cancel,
            ..Abandoned::default()
        }
    }

    fn only_broken() -> Abandoned {
        Abandoned {
            broken: true,
            ..Abandoned::default()
        }
    }

    #[test]
    fn a_wait_is_cancelled_and_rolled_back() {
        assert_eq!(begin(FOREVER).abandoned(), rolls_back(true, true));
        assert_eq!(begin(TRY).abandoned(), rolls_back(true, false));
        let isolated = begin(FOREVER).answer(token("repeatable"));
        assert_eq!(isolated.abandoned(), rolls_back(true, true));
        let turning = begin(FOREVER)
            .times_out(900)
            .answer(DONE)
            .answer(value(900));
        assert_eq!(turning.abandoned(), rolls_back(true, true));
        assert_eq!(turning.answer(DONE).abandoned(), rolls_back(true, false));
    }

    #[test]
    fn a_transaction_that_holds_nothing_is_rolled_back() {
        let rolling_back = begin(TRY).answer(token("dlock_taken"));
        assert_eq!(rolling_back.abandoned(), rolls_back(false, false));
    }

    /// The session may hold the lock, which no rollback frees.
    #[test]
    fn after_the_sessions_lock_was_asked_for_the_connection_is_broken() {
        let rolling_back = begin(FOREVER).answer(token("repeatable")).answer(plain());
        assert!(rolling_back.abandoned().broken);
        let verifying = rolling_back.answer(DONE);
        assert_eq!(verifying.abandoned(), only_broken());
        let handing_over = begin(TRY)
            .answer(token("repeatable"))
            .answer(DONE)
            .answer(value(1));
        assert_eq!(handing_over.abandoned(), rolls_back(true, false));
    }

    #[test]
    fn between_two_polls_there_is_nothing_to_do() {
        let sleeping = begin(poll(None)).answer(token("dlock_taken")).answer(DONE);
        assert_eq!(sleeping.abandoned(), Abandoned::default());
    }
}
