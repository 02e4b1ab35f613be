use std::marker::PhantomData;
use std::time::Duration;

use super::{Abandoned, Aftermath, Answer, Dialect, Failure, Machine, Reason, Step};

/// How a session is asked whether it is there.
#[derive(Clone, Copy, Debug)]
pub struct AreYouThere {
    pub(crate) message: &'static str,
    /// Whether the driver reports a session that is gone as gone, at the latest in the answer to this message. Where it
    /// does not, a session that is there obeys the message, so any error counts as its end. A statement that somebody
    /// has killed looks the same, so there dlock asks only where it knows no other reason for the failure.
    pub(crate) driver_tells: bool,
}

impl AreYouThere {
    fn is_needed(self, failure: &Failure) -> bool {
        let reason_is_open = match failure.reason {
            Reason::Database => true,
            Reason::Lost => false,
            _ => self.driver_tells,
        };
        // Where the connection is out of step, nobody knows to which question the answer would belong.
        reason_is_open
            && failure.cause.is_some()
            && failure.aftermath != Aftermath::EndSessionUnread
    }

    fn judge(self, failure: Failure, answer: &Answer) -> Failure {
        match answer {
            Answer::Error(error) if error.lost => failure.lost_meanwhile(),
            // The session may be there, and somebody killed both statements: this does no less than the failure asked
            // for.
            Answer::Error(_) if !self.driver_tells => Failure {
                aftermath: failure.aftermath.worse(Aftermath::MarkBroken),
                ..failure.lost_meanwhile()
            },
            _ => failure,
        }
    }
}

/// A conversation that tells a session that is gone from one that has failed.
///
/// A server that ends a session says so as the answer to what was asked last, and not every driver tells that from
/// other errors. So where a conversation ends with an error, the session is asked whether it is there.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | talks | what the conversation sends | an error, and with it the conversation fails | asks |
/// | | | the same, and the session is lost | fails so |
/// | | | the same, and the reason is known (MySQL) | fails so |
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
    fn ask(&mut self, step: &mut Step<M::Output>) {
        if let (Step::Done(Err(failure)), Some(ask)) = (&*step, D::ARE_YOU_THERE) {
            if ask.is_needed(failure) {
                self.failure = Some(Box::new(failure.clone()));
                *step = Step::Batch(ask.message.into());
            }
        }
    }
}

impl<D: Dialect, M: Machine> Machine for StillThere<D, M> {
    type Output = M::Output;

    const TIMED: bool = M::TIMED;

    #[inline]
    fn start(&mut self, now: Duration) -> Step<M::Output> {
        self.machine.start(now)
    }

    #[inline]
    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        if let (Some(failure), Some(ask)) = (self.failure.take(), D::ARE_YOU_THERE) {
            return Step::failed(ask.judge(*failure, &answer));
        }
        // Any other answer shows that the session is there.
        let is_error = matches!(answer, Answer::Error(_));
        let mut step = self.machine.next(answer, now);
        if is_error {
            self.ask(&mut step);
        }
        step
    }

    /// Carries out what the failure asks for, which nobody has done yet.
    fn abandon(&self) -> Abandoned {
        let Some(failure) = &self.failure else {
            return self.machine.abandon();
        };
        match failure.aftermath {
            Aftermath::Clean if !D::UNREAD_ANSWERS_SHIFT => Abandoned::default(),
            Aftermath::Clean | Aftermath::MarkBroken => Abandoned::broken(),
            Aftermath::EndSession | Aftermath::EndSessionUnread => Abandoned {
                messages: D::END_SESSION.iter().copied().map(Into::into).collect(),
                ..Abandoned::broken()
            },
        }
    }
}
