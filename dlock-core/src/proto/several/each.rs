use std::time::Duration;

use crate::LockKey;
use crate::proto::{Abandoned, Aftermath, Answer, Failure, Hold, Machine, Reason, Session, Step};

/// Releases several holds, the last one first, each with a conversation of its own.
///
/// One that was lost does not keep the others from being released. Of the failures, the first counts.
#[derive(Debug)]
pub(crate) struct ReleaseEach<K, R> {
    left: Vec<Hold<K>>,
    release: fn(Hold<K>, Session) -> R,
    released_in: Session,
    at_work: Option<(R, Option<Box<LockKey>>)>,
    failed: Option<Failure>,
    /// What to do if it is abandoned, about those that are left.
    abandoned: fn(&[Hold<K>]) -> Abandoned,
    outlive: bool,
}

impl<K, R: Machine<Output = ()>> ReleaseEach<K, R> {
    pub(crate) fn new(
        holds: Vec<Hold<K>>,
        released_in: Session,
        release: fn(Hold<K>, Session) -> R,
        abandoned: fn(&[Hold<K>]) -> Abandoned,
        outlive: bool,
    ) -> Self {
        Self {
            left: holds,
            release,
            released_in,
            at_work: None,
            failed: None,
            abandoned,
            outlive,
        }
    }

    fn go_on(&mut self, now: Duration) -> Step<()> {
        let Some(mut hold) = self.left.pop() else {
            return Step::Done(self.failed.take().map_or(Ok(()), Err));
        };
        let name = hold.name.take();
        let mut machine = (self.release)(hold, self.released_in);
        let step = machine.start(now);
        self.at_work = Some((machine, name));
        self.follow(step, now)
    }

    fn follow(&mut self, step: Step<()>, now: Duration) -> Step<()> {
        step.map(|result| {
            let name = self.at_work.take().and_then(|(_, name)| name);
            if let Err(mut failure) = result {
                failure.key = failure.key.or(name);
                let ends = matches!(
                    failure.aftermath,
                    Aftermath::EndSession | Aftermath::EndSessionUnread
                ) || failure.reason == Reason::Lost;
                if let Some(first) = self.failed.take() {
                    let aftermath = first.aftermath.worse(failure.aftermath);
                    failure = Failure { aftermath, ..first };
                }
                if ends && !self.outlive {
                    return Step::failed(failure);
                }
                self.failed = Some(failure);
            }
            self.go_on(now)
        })
    }
}

impl<K: Send, R: Machine<Output = ()>> Machine for ReleaseEach<K, R> {
    type Output = ();

    const TIMED: bool = R::TIMED;

    fn start(&mut self, now: Duration) -> Step<()> {
        self.go_on(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<()> {
        let (machine, _) = self.at_work.as_mut().expect("BUG: nothing is released");
        let step = machine.next(answer, now);
        self.follow(step, now)
    }

    fn abandon(&self) -> Abandoned {
        let at_work = self.at_work.as_ref();
        let mut abandoned =
            at_work.map_or_else(Abandoned::default, |(machine, _)| machine.abandon());
        let rest = (self.abandoned)(&self.left);
        abandoned.messages.extend(rest.messages);
        abandoned.requests.extend(rest.requests);
        abandoned.broken |= rest.broken;
        abandoned
    }
}
