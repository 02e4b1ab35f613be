use std::ops::Range;

use super::{Keys, ReleaseAll};
use crate::postgres::inside::AcquireInside;
use crate::postgres::release::Release;
use crate::postgres::sql;
use crate::proto::{
    Abandoned, Either, Hold, NoTry, OpenTransaction, ReleaseEach, Session, Several, Steps, Wait,
};
use crate::{LockKey, PostgresKey};

/// Takes several locks of a session inside an open transaction, one by one: each stands behind a savepoint of its own,
/// so that it can be released if the transaction is aborted later.
#[derive(Debug)]
pub(in crate::postgres) struct InsideSteps {
    keys: Keys,
    session: Session,
    droppable: bool,
}

impl InsideSteps {
    pub(in crate::postgres) fn several(
        keys: Keys,
        wait: Wait,
        session: Session,
        droppable: bool,
    ) -> Several<Self> {
        let steps = Self {
            keys,
            session,
            droppable,
        };
        Several::new(steps, wait)
    }

    pub(in crate::postgres) fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Steps for InsideSteps {
    type Key = PostgresKey;
    type Try = NoTry;
    type Wait = AcquireInside;
    type Back = ReleaseEach<PostgresKey, Release>;

    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey> {
        self.keys.names.iter()
    }

    fn try_all(&self, _range: Range<usize>) -> Option<NoTry> {
        None
    }

    fn wait(&self, index: usize, wait: Wait) -> AcquireInside {
        let key = self.keys.get(index);
        AcquireInside::new(key, self.keys.mode, wait, self.session, self.droppable)
    }

    fn hold(&self, _index: usize, _tried: &NoTry) -> Hold<PostgresKey> {
        unreachable!("BUG: they are taken one by one")
    }

    fn give_back(&self, holds: Vec<Hold<PostgresKey>>) -> Self::Back {
        release_each(holds, self.session)
    }

    fn abandoned(&self, mut at_work: Abandoned, held: &[Hold<PostgresKey>]) -> Abandoned {
        let (keys, mode) = (Keys::of(held), self.keys.mode);
        let release = sql::release_all_unread(&keys, mode, OpenTransaction::Keep);
        at_work.messages.push(release.into());
        Abandoned {
            broken: true,
            ..at_work
        }
    }
}

fn release_each(
    holds: Vec<Hold<PostgresKey>>,
    session: Session,
) -> ReleaseEach<PostgresKey, Release> {
    // The connection is broken then, and nobody knows what the transaction is.
    ReleaseEach::new(holds, session, Release::new, |_| Abandoned::broken(), false)
}

/// A release of one hold, of several behind savepoints, or of several others.
type Released = Either<Release, Either<ReleaseEach<PostgresKey, Release>, ReleaseAll>>;

/// Releases one hold or several, in the way in which they were taken.
pub(in crate::postgres) fn release(hold: Hold<PostgresKey>, session: Session) -> Released {
    if hold.more.is_empty() {
        return Either::One(Release::new(hold, session));
    }
    let behind_savepoints = hold.savepoint.is_some();
    let holds = hold.into_all();
    Either::several(match behind_savepoints {
        true => Either::One(release_each(holds, session)),
        false => Either::several(ReleaseAll::new(holds)),
    })
}
