//! What is refused without a message, and what is only asked.

use dlock_core::proto::{
    Abandoned, Ask, Bind, Columns, Dialect, Failure, Machine, Postgres, Prepared, Reason, Rows,
    Step, TransactionDialect,
};
use dlock_core::{Holder, LockKey};

use crate::common::*;
use crate::postgres_server::Does::*;
use crate::script::*;

mod refusals {
    use super::*;

    fn plain_ask() -> Ask {
        Ask::new(42.into())
    }

    #[test]
    fn a_sessions_lock_in_an_open_transaction() {
        let refused = |ask: &Ask, session| Postgres::acquire(ask, session).err();
        let ask = plain_ask();
        assert_eq!(refused(&ask, INSIDE), Some(clean(Reason::InTransaction)));
        assert_eq!(
            refused(&ask, at_depth(2)),
            Some(clean(Reason::InTransaction))
        );
        assert_eq!(refused(&ask, OUTSIDE), None);
        // What `begin_test_transaction` has begun is let through.
        assert_eq!(refused(&ask, IN_TEST), None);
        let allowed = Ask {
            inside_transaction: true,
            ..plain_ask()
        };
        assert_eq!(refused(&allowed, INSIDE), None);
    }

    #[test]
    fn a_transactions_lock_without_a_transaction() {
        let refused = |session| Postgres::acquire_in_transaction(&plain_ask(), session).err();
        assert_eq!(refused(OUTSIDE), Some(clean(Reason::NotInTransaction)));
        assert_eq!(refused(INSIDE), None);
        assert_eq!(refused(IN_TEST), None);
    }

    #[test]
    fn a_key_that_is_none() {
        let key = LockKey::from("");
        let invalid = Failure::from(key.to_postgres().unwrap_err());
        assert!(matches!(invalid.reason, Reason::InvalidKey(_)));
        let ask = Ask::new(key.clone());
        assert_eq!(
            Postgres::acquire(&ask, OUTSIDE).err(),
            Some(invalid.clone())
        );
        assert_eq!(
            Postgres::acquire_in_transaction(&ask, INSIDE).err(),
            Some(invalid.clone())
        );
        assert_eq!(Postgres::begin(&ask).err(), Some(invalid.clone()));
        assert_eq!(Postgres::holders(&key).err(), Some(invalid));
    }
}

mod timeouts {
    use super::*;

    fn named(wait: dlock_core::proto::Wait) -> Ask {
        Ask {
            name_holders: true,
            ..asked(wait)
        }
    }

    fn holder() -> Holder {
        Holder::from_columns(4711, Some("billing".into()), None, 1, 1, Some(7))
    }

    fn holders(holders: Vec<Holder>) -> dlock_core::proto::Answer {
        dlock_core::proto::Answer::Rows(Rows::Holders(holders))
    }

    fn timeout(waited: u64, holders: Vec<Holder>) -> Failure {
        clean(Reason::Timeout {
            waited: millis(waited),
            holders,
        })
    }

    #[test]
    fn name_who_has_the_lock() {
        play_at(
            Postgres::acquire(leak(named(limit(millis(250)))), OUTSIDE).unwrap(),
            millis(9_000),
        )
        .at(millis(9_251))
        .answer(plain())
        .answer(value(0))
        .sends([Holders])
        .answer(holders(vec![holder()]))
        .failed(timeout(251, vec![holder()]));
        acquire_as(named(TRY), INSIDE)
            .answer(token("dlock_taken"))
            .answer(DONE)
            .sends([Holders])
            .answer(holders(vec![holder()]))
            .failed(timeout(0, vec![holder()]));
        play(Postgres::acquire_in_transaction(leak(named(TRY)), INSIDE).unwrap())
            .answer(value(0))
            .sends([Holders])
            .answer(holders(vec![holder()]))
            .failed(timeout(0, vec![holder()]));
        play(Postgres::begin(leak(named(TRY))).unwrap())
            .answer(token("dlock_taken"))
            .answer(DONE)
            .sends([Holders])
            .answer(holders(vec![holder()]))
            .failed(timeout(0, vec![holder()]));
    }

    fn told(wait: dlock_core::proto::Wait) -> Ask {
        Ask {
            tell_holders: true,
            ..asked(wait)
        }
    }

    #[test]
    fn name_who_has_the_lock_once_after_the_first_turn() {
        let after_a_turn = |ask| {
            acquire_as(ask, OUTSIDE)
                .asks(900)
                .times_out(900)
                .answer(value(0))
        };
        let prepares = || {
            [PrepareTurn {
                rest: 60_000,
                long: 1_800,
            }]
        };
        let looking = after_a_turn(told(FOREVER)).sends([Holders]);
        assert!(looking.abandoned().broken);
        let telling = looking.answer(holders(vec![holder()]));
        assert!(matches!(telling.step(), Step::Tell(told) if *told == [holder()]));
        telling
            .answer(DONE)
            .sends(prepares())
            .answer(value(900))
            .answer(DONE)
            .sends([IsHeld])
            .answer(value(0))
            .sends([PrepareTurn {
                rest: 60_000,
                long: 3_600,
            }]);
        // Nobody, or nobody can tell.
        after_a_turn(told(FOREVER))
            .answer(holders(vec![]))
            .sends(prepares());
        after_a_turn(told(FOREVER))
            .answer(plain())
            .sends([Holders])
            .answer(plain())
            .sends(prepares());
        after_a_turn(told(FOREVER)).answer(lost()).failed(gone());
        let begun = || {
            play(Postgres::begin(leak(told(FOREVER))).unwrap())
                .times_out(900)
                .answer(DONE)
        };
        begun()
            .sends([Holders])
            .answer(holders(vec![]))
            .sends(prepares());

        // Not where it is short.
        let prepares = [PrepareTurn {
            rest: 1_099,
            long: 1_800,
        }];
        after_a_turn(told(limit(millis(1_999)))).sends(prepares);
    }

    #[test]
    fn are_timeouts_also_if_nobody_can_tell() {
        let asking = || acquire_as(named(TRY), OUTSIDE).answer(value(0));
        asking().answer(holders(vec![])).failed(timeout(0, vec![]));
        // The session may have forgotten the question.
        let again = || {
            asking()
                .answer(plain())
                .sends([Holders])
                .kept_as(Prepared::Never)
        };
        again()
            .answer(holders(vec![holder()]))
            .failed(timeout(0, vec![holder()]));
        again().answer(plain()).failed(timeout(0, vec![]));
        for strange in [value(1), NULL] {
            asking().answer(strange).failed(Failure {
                aftermath: out_of_step().aftermath,
                ..timeout(0, vec![])
            });
        }
    }

    #[test]
    fn on_a_lost_connection_say_so() {
        let failure = acquire_as(named(TRY), OUTSIDE)
            .answer(value(0))
            .answer(lost())
            .ended()
            .unwrap_err();
        assert_eq!(failure.aftermath, gone().aftermath);
        assert!(matches!(failure.reason, Reason::Timeout { .. }));
    }

    #[test]
    fn do_not_ask_in_vain() {
        acquire_as(asked(TRY), OUTSIDE).answer(value(0)).gave_up();
        acquire_as(named(FOREVER), OUTSIDE).answer(value(1)).holds();
    }

    #[test]
    fn may_be_abandoned_while_they_ask() {
        let asking = acquire_as(named(TRY), OUTSIDE).answer(value(0));
        assert_eq!(asking.abandoned(), Abandoned::default());
    }
}

mod is_held {
    use super::*;

    fn asks(answer: dlock_core::proto::Answer) -> Script<impl Machine<Output = bool>> {
        let hold = acquire_as(asked(FOREVER), OUTSIDE).answer(value(1)).holds();
        let hold: &'static Held = Box::leak(Box::new(hold));
        play(Postgres::is_held(hold))
            .sends([IsHeld])
            .kept_as(Prepared::ByText)
            .answer(answer)
    }

    #[test]
    fn the_session_says_so() {
        assert_eq!(asks(value(1)).ended(), Ok(true));
        assert_eq!(asks(value(0)).ended(), Ok(false));
        assert_eq!(asks(NULL).ended(), Ok(false));
    }

    #[test]
    fn after_an_error_it_is_asked_again_unprepared() {
        let again = || asks(plain()).sends([IsHeld]).kept_as(Prepared::Never);
        assert_eq!(again().answer(value(1)).ended(), Ok(true));
        again()
            .answer(plain())
            .failed(clean(Reason::Database).because());
        asks(lost()).failed(gone());
    }

    #[test]
    fn rows_of_another_question_are_out_of_step() {
        asks(dlock_core::proto::Answer::Rows(Rows::Text("1".into()))).failed(out_of_step());
    }
}

mod holders {
    use super::*;

    #[test]
    fn are_asked_for_by_the_three_numbers_of_the_key() {
        for (key, binds) in [
            (LockKey::from(42), [0, 42, 1]),
            (LockKey::from(-1), [0xffff_ffff, 0xffff_ffff, 1]),
            (LockKey::from(i64::MIN), [0x8000_0000, 0, 1]),
            (LockKey::from((1, -2)), [1, 0xffff_fffe, 2]),
        ] {
            let script = play(Postgres::holders(&key).unwrap());
            let statement = script.statement();
            assert_eq!(statement.columns, Columns::Holders);
            let [high, low, subid] = binds;
            let expected = [
                Bind::BigInt(high),
                Bind::BigInt(low),
                Bind::Integer(subid as i32),
            ];
            assert!(statement.binds.iter().eq(&expected), "{statement:?}");
        }
    }
}
