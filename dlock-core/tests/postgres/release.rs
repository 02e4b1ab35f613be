//! Giving a hold back: one of several, and in every state that the transaction may be in.

use dlock_core::proto::{
    Abandoned, Aftermath, Dialect, Failure, Machine, Parting, Postgres, Prepared, Reason, Session,
};

use crate::common::*;
use crate::postgres_server::Does::*;
use crate::postgres_server::Message;
use crate::script::*;

fn held() -> Held {
    acquire_as(asked(FOREVER), OUTSIDE).answer(value(1)).holds()
}

fn held_droppable() -> Held {
    acquire_as(droppable(FOREVER), OUTSIDE)
        .answer(value(1))
        .holds()
}

fn held_inside() -> Held {
    acquire_as(asked(FOREVER), INSIDE).answer(DONE).holds()
}

fn release() -> Script<impl Machine<Output = ()>> {
    play(Postgres::release(held(), OUTSIDE))
}

fn release_inside() -> Script<impl Machine<Output = ()>> {
    play(Postgres::release(held_inside(), INSIDE))
}

fn not_held() -> Failure {
    Failure {
        aftermath: Aftermath::MarkBroken,
        ..clean(Reason::NotHeld)
    }
}

mod outside_a_transaction {
    use super::*;

    #[test]
    fn it_takes_one_statement() {
        release()
            .sends([Unlock])
            .kept_as(Prepared::PostgresUnlock)
            .answer(value(1))
            .ended()
            .unwrap();
        release().answer(value(0)).failed(not_held());
    }

    /// That is the one which has acquired it, so it is prepared.
    #[test]
    fn what_may_be_dropped_takes_the_same_statement_as_the_acquire() {
        play(Postgres::release(held_droppable(), OUTSIDE))
            .sends([UnlockDroppable])
            .kept_as(Prepared::PostgresDroppable)
            .answer(value(1))
            .ended()
            .unwrap();
    }

    /// It has released nothing: a cancel, or a statement that the session has forgotten.
    #[test]
    fn after_an_error_it_is_sent_again_unprepared() {
        for held in [held, held_droppable] {
            let again = || {
                play(Postgres::release(held(), OUTSIDE))
                    .answer(plain())
                    .sends([Unlock])
                    .kept_as(Prepared::Never)
            };
            again().answer(value(1)).ended().unwrap();
            again().answer(value(0)).failed(not_held().because());
            again()
                .answer(plain())
                .failed(broken(Reason::Database).because());
            again().answer(NULL).failed(broken(Reason::Database));
            again().answer(lost()).failed(gone());
        }
        release().answer(lost()).failed(gone());
    }

    #[test]
    fn an_answer_of_another_kind_ends_the_session() {
        for strange in [NULL, value(7), DONE] {
            release().answer(strange).failed(broken(Reason::Database));
        }
    }
}

mod inside_a_transaction {
    use super::*;

    #[test]
    fn the_savepoint_goes_first() {
        let releasing = || {
            release_inside()
                .sends([gone_savepoint(), UnlockAndKeep])
                .answer(DONE)
                .sends([ReadUnlocked])
        };
        releasing().answer(value(1)).ended().unwrap();
        releasing().answer(value(0)).failed(not_held());
        releasing()
            .answer(plain())
            .failed(broken(Reason::Database).because());
        releasing().answer(lost()).failed(gone());
    }

    #[test]
    fn an_aborted_transaction_is_aborted_again() {
        let releasing = || {
            release_inside()
                .answer(plain())
                .sends([back(), UnlockAndFail])
        };
        releasing().answer(token("dlock_released")).ended().unwrap();
        releasing()
            .answer(token("dlock_not_held"))
            .failed(not_held().because());
        for unknown in [plain(), detail("A detail.")] {
            releasing()
                .answer(unknown)
                .failed(broken(Reason::Database).because());
        }
        releasing().answer(lost()).failed(gone());
        releasing().answer(DONE).failed(broken(Reason::Database));
        release_inside().answer(lost()).failed(gone());
    }

    #[test]
    fn in_every_language() {
        for answer in [
            "Token »dlock_released« ist ungültig.",
            "Le jeton « dlock_released » n'est pas valide.",
        ] {
            release_inside()
                .answer(plain())
                .answer(detail(answer))
                .ended()
                .unwrap();
        }
    }

    #[test]
    fn the_savepoint_has_gone_with_its_transaction() {
        for session in [OUTSIDE, INSIDE] {
            let hold = acquire_as(asked(FOREVER), at_depth(2)).answer(DONE).holds();
            play(Postgres::release(hold, session))
                .sends([Unlock])
                .answer(value(1))
                .ended()
                .unwrap();
        }
    }
}

mod abandoned {
    use super::*;

    #[test]
    fn it_is_obeyed_but_nobody_knows() {
        let only_broken = Abandoned {
            broken: true,
            ..Abandoned::default()
        };
        assert_eq!(release().abandoned(), only_broken);
        assert_eq!(release().answer(plain()).abandoned(), only_broken);
        assert_eq!(release_inside().abandoned(), only_broken);
        assert_eq!(release_inside().answer(plain()).abandoned(), only_broken);
    }

    #[test]
    fn what_it_has_done_need_not_be_read() {
        let reading = release_inside().answer(DONE);
        assert_eq!(reading.abandoned(), Abandoned::default());
    }
}

/// The walk looks at what becomes of the session.
mod given_up {
    use super::*;

    #[track_caller]
    fn parts(
        hold: &Held,
        session: Option<Session>,
        messages: &[crate::postgres_server::Does],
        broken: bool,
    ) {
        let parting = Postgres::part(hold, session);
        let message = Message::of_text(parting.message.as_deref().unwrap(), None);
        assert_eq!(message.statements, messages, "{session:?}");
        let Parting { request, .. } = parting;
        assert_eq!((parting.broken, request), (broken, None), "{session:?}");
    }

    #[test]
    fn by_one_message() {
        let outside = [NoStatementTimeout, Unlock];
        let rolled_back = [RollBack, NoStatementTimeout, Unlock];
        let hold = held();
        parts(&hold, Some(OUTSIDE), &outside, false);
        parts(&hold, Some(INSIDE), &rolled_back, true);
        parts(&hold, Some(at_depth(2)), &rolled_back, true);
        parts(&hold, Some(IN_TEST), &rolled_back, true);
        parts(&hold, None, &rolled_back, true);
        let hold = held_inside();
        parts(&hold, Some(OUTSIDE), &outside, false);
        parts(&hold, Some(INSIDE), &[Unlock], true);
        parts(&hold, Some(at_depth(2)), &[Unlock], true);
        parts(&hold, Some(IN_TEST), &[Unlock], false);
        parts(&hold, None, &[Unlock], true);
    }
}
