use std::marker::PhantomData;
use std::time::Duration;

use super::{Abandoned, Aftermath, Answer, Dialect, Failure, Machine, Reason, Step};

/// How a session is asked whether it is there.
#[derive(Clone, Copy, Debug)]
pub struct AreYouThere {
    pub(crate) message: &'static str,
    /// Whether the driver tells, at the latest now, that the session is gone. Where it does not, a session that is there
    /// obeys, and any error means that it is gone. Only a failure that says nothing else is worth that guess.
    pub(crate) is_told: bool,
    /// Whether an answer that nobody reads puts the connection out of step.
    pub(crate) unread_breaks: bool,
}

/// A conversation that tells a session that is gone from one that has failed.
///
/// A server that ends a session says so as the answer to what was asked last, and not every driver tells that from
/// other errors. So after an error the session is asked whether it is there.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | talks | what the conversation sends | it fails because of an error | asks |
/// | | | it ends otherwise | ends so |
/// | asks | [`Dialect::ARE_YOU_THERE`] | the session is gone | fails: lost |
/// | | | it is there | fails as the conversation did |
#[derive(Debug)]
pub struct StillThere<D, M> {
    machine: M,
    /// Of a conversation that has failed.
    failure: Option<Box<Failure>>,
    dialect: PhantomData<fn() -> D>,
}

impl<D: Dialect, M: Machine> StillThere<D, M> {
    /// Wraps a conversation with a server of the dialect.
    pub fn new(machine: M) -> Self {
        Self {
            machine,
            failure: None,
            dialect: PhantomData,
        }
    }

    /// Asks in place of a failure. A step is not moved here: that would cost a free lock a hundred instructions.
    #[inline]
    fn ask(&mut self, step: &mut Step<M::Output>) {
        if let (Step::Done(Err(failure)), Some(ask)) = (&*step, D::ARE_YOU_THERE) {
            if ask.is_needed(failure) {
                self.failure = Some(Box::new(failure.clone()));
                *step = Step::Batch(ask.message.into());
            }
        }
    }
}

impl AreYouThere {
    fn is_needed(self, failure: &Failure) -> bool {
        failure.cause.is_some()
            && match failure.reason {
                Reason::Database => true,
                Reason::Lost => false,
                _ => self.is_told,
            }
    }

    fn judge(self, failure: Failure, answer: &Answer) -> Failure {
        match answer {
            Answer::Error(error) if error.lost => failure.lost_meanwhile(),
            // It may be there, and each question was killed: no less is done than the failure asked for.
            Answer::Error(_) if !self.is_told => Failure {
                aftermath: failure.aftermath.worse(Aftermath::MarkBroken),
                ..failure.lost_meanwhile()
            },
            _ => failure,
        }
    }
}

impl<D: Dialect, M: Machine> Machine for StillThere<D, M> {
    type Output = M::Output;

    const TIMED: bool = M::TIMED;

    #[inline]
    fn start(&mut self, now: Duration) -> Step<M::Output> {
        let mut step = self.machine.start(now);
        self.ask(&mut step);
        step
    }

    #[inline]
    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        if let (Some(failure), Some(ask)) = (self.failure.take(), D::ARE_YOU_THERE) {
            return Step::failed(ask.judge(*failure, &answer));
        }
        let mut step = self.machine.next(answer, now);
        self.ask(&mut step);
        step
    }

    /// What the failure asks for has not been done.
    fn abandon(&self) -> Abandoned {
        let Some(failure) = &self.failure else {
            return self.machine.abandon();
        };
        let unread_breaks = D::ARE_YOU_THERE.is_some_and(|ask| ask.unread_breaks);
        match failure.aftermath {
            Aftermath::Clean if !unread_breaks => Abandoned::default(),
            Aftermath::Clean | Aftermath::MarkBroken => Abandoned::broken(),
            Aftermath::EndSession | Aftermath::EndSessionUnread => Abandoned {
                messages: vec![D::END_SESSION.into()],
                ..Abandoned::broken()
            },
        }
    }
}
