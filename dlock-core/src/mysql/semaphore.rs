use std::time::Duration;

use super::errno::reason;
use super::slot_sql;
use super::sql::{self, Cluster, Limit};
use super::tag::Tag;
use super::writers::{Known, Writers};
use crate::Mode;
use crate::proto::{
    Abandoned, AfterBusy, Answer, Ask, Cause, Depth, ErrorFields, Failure, Hold, Machine, Reason,
    Rows, Step, Wait, Waiting,
};

/// Acquires a slot of a semaphore.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Try` | one statement that tries all slots | a slot | granted |
/// | | | none | `Wait`; `Sleep` (polling), or gives up |
/// | | | it is a node of a cluster | fails, nothing is held |
/// | | | it may be one of several servers that take writes | `Writers` |
/// | `Wait` | one statement that waits at the gate, then looks for a slot | a slot | granted |
/// | | | none | `Wait` for what is left of the limit, or gives up |
/// | | | killed | fails, nothing is held |
/// | `Try`, `Wait` | | an error | `KeepErrno` |
/// | | | anything else | `GiveBack` |
/// | `KeepErrno` | keeps the error's number | any | `GiveBack` |
/// | `GiveBack` | releases the gate and the slot of the request | which error it was | fails, nothing is held |
/// | | | the server knows nothing of clusters | `Try`, without that question |
/// | | | anything else | fails, the session is ended |
/// | `Writers` | is it one of several servers that take writes? | yes | fails, nothing is held |
/// | | | no | `Try` |
/// | | | an error | `Writers`, once; then fails, nothing is held |
/// | `Sleep` | | | `Try`, or `Wait` |
/// | each | | the answer to an earlier question | fails, the session is ended |
/// | each | | an error: the session is gone | fails, nothing is held |
#[derive(Debug)]
pub(super) struct AcquireSlot {
    base: String,
    permits: u32,
    /// The session has slots already, and wants another one.
    another: bool,
    pub(super) wait: Wait,
    depth: Depth,
    droppable: bool,
    cancellable: bool,
    cluster: Cluster,
    waiting: Waiting,
    state: State,
}

/// A slot was asked for.
#[derive(Clone, Copy, Debug)]
struct Request {
    tag: Tag,
    waits: bool,
    sent: Duration,
}

#[derive(Debug)]
enum State {
    Ask(Request),
    KeepErrno(Request, Cause),
    GiveBack {
        request: Request,
        tag: Tag,
        cause: Cause,
        /// `None`: the session has kept the error's number.
        reason: Option<Reason>,
    },
    Writers(Request, Writers),
    /// Before a try, or before a wait of so many milliseconds.
    Sleep(Option<Option<u32>>),
}

type Acquired = Step<Option<Hold<String>>>;

impl AcquireSlot {
    pub(super) fn new(base: String, permits: u32, ask: &Ask, depth: Depth) -> Self {
        Self {
            base,
            permits,
            another: !ask.except.is_empty(),
            wait: ask.wait,
            depth,
            droppable: ask.droppable,
            cancellable: ask.cancellable,
            cluster: Cluster::Checked,
            waiting: ask.wait.since(Duration::ZERO),
            state: State::Sleep(None),
        }
    }

    /// What the names of the locks begin with, and the number of slots.
    pub(super) fn semaphore(&self) -> (&str, u32) {
        (&self.base, self.permits)
    }

    fn try_all(&mut self, now: Duration) -> Acquired {
        let tag = Tag::new();
        self.state = State::Ask(Request {
            tag,
            waits: false,
            sent: now,
        });
        let which = (self.permits, self.another);
        let take = slot_sql::take_slot(tag, &self.base, which, self.cluster);
        Step::Query(take)
    }

    fn wait(&mut self, millis: Option<u32>, now: Duration) -> Acquired {
        let tag = Tag::new();
        self.state = State::Ask(Request {
            tag,
            waits: true,
            sent: now,
        });
        let millis = millis.map_or(sql::FOREVER, i64::from);
        Step::Query(slot_sql::wait_for_slot(
            tag,
            &self.base,
            self.permits,
            millis,
        ))
    }

    fn taken(&mut self, request: Request, now: Duration) -> Acquired {
        match self.waiting.after_busy(now) {
            AfterBusy::GiveUp => Step::Done(Ok(None)),
            AfterBusy::Sleep(interval) => {
                self.state = State::Sleep(None);
                Step::Sleep(interval)
            }
            // A server that does not wait is not asked again without a pause.
            AfterBusy::Queue(millis)
                if request.waits && now.saturating_sub(request.sent) < Wait::PAUSE =>
            {
                self.state = State::Sleep(Some(millis));
                Step::Sleep(Wait::PAUSE)
            }
            AfterBusy::Queue(millis) => self.wait(millis, now),
        }
    }

    fn give_back(&mut self, request: Request, reason: Option<Reason>, cause: Cause) -> Acquired {
        let tag = Tag::new();
        self.state = State::GiveBack {
            request,
            tag,
            cause,
            reason,
        };
        Step::Query(slot_sql::give_back(tag, request.tag))
    }

    fn granted(&self, slot: u32) -> Acquired {
        Step::Done(Ok(Some(Hold {
            slot: Some(slot),
            unchecked: self.cluster == Cluster::Unchecked,
            ..Hold::new(
                format!("{}:{slot}", self.base),
                Mode::Exclusive,
                self.depth,
                self.droppable,
            )
        })))
    }

    fn answered(
        &mut self,
        request: Request,
        (slot, answer): (Option<i64>, Option<i64>),
        now: Duration,
    ) -> Acquired {
        let is_slot = |slot: &i64| (0..i64::from(self.permits)).contains(slot);
        match (request.tag.remove(answer), slot.filter(is_slot)) {
            (Err(out_of_step), _) => Step::failed(out_of_step),
            (Ok(sql::GRANTED), Some(slot)) => self.granted(slot as u32),
            (Ok(sql::TAKEN), _) => self.taken(request, now),
            (Ok(slot_sql::PERHAPS_CLUSTER), _)
                if !request.waits && self.cluster == Cluster::Checked =>
            {
                let (writers, question) = Writers::ask(Cause::default());
                self.state = State::Writers(request, writers);
                Step::Query(question)
            }
            (Ok(slot_sql::CLUSTER), _) => Step::failed(Reason::Cluster.clean(Cause::default())),
            (Ok(sql::KILLED), _) => Step::failed(Reason::Interrupted.clean(Cause::default())),
            (Ok(_), _) => self.give_back(request, Some(Reason::Database), Cause::default()),
        }
    }
}

impl Machine for AcquireSlot {
    type Output = Option<Hold<String>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.waiting = self.wait.since(now);
        self.try_all(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        match (
            std::mem::replace(&mut self.state, State::Sleep(None)),
            answer,
        ) {
            (
                _,
                Answer::Error(ErrorFields {
                    lost: true, cause, ..
                }),
            ) => Step::failed(Failure::lost(cause)),

            (State::Ask(request), Answer::Rows(Rows::Pair(slot, answer))) => {
                self.answered(request, (slot, answer), now)
            }
            (State::Ask(request), Answer::Error(error)) => {
                self.state = State::KeepErrno(request, error.cause);
                Step::Batch(sql::KEEP_ERRNO.into())
            }
            (State::Ask(request), _) => {
                self.give_back(request, Some(Reason::Database), Cause::default())
            }

            (State::KeepErrno(request, cause), Answer::Done) => {
                self.give_back(request, None, cause)
            }
            // The session did not even keep the number: it may be gone.
            (State::KeepErrno(request, cause), _) => {
                self.give_back(request, Some(Reason::Database), cause)
            }

            (
                State::GiveBack {
                    tag,
                    cause,
                    reason: known,
                    ..
                },
                Answer::Rows(Rows::Pair(errno, answer)),
            ) => {
                let reason = match known {
                    None => reason(errno, Limit::Try).unwrap_or(Reason::Database),
                    Some(reason) => reason,
                };
                match tag.remove(answer) {
                    Ok(1)
                        if reason == Reason::UnknownVariable
                            && self.cluster == Cluster::Checked =>
                    {
                        self.cluster = Cluster::Unchecked;
                        self.try_all(now)
                    }
                    Ok(1) => Step::failed(reason.clean(cause)),
                    Ok(_) => Step::failed(reason.broken(cause)),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::GiveBack { cause, reason, .. }, _) => {
                Step::failed(reason.unwrap_or(Reason::Database).broken(cause))
            }

            (State::Writers(request, writers), answer) => match writers.next(answer) {
                Known::Alone => {
                    self.cluster = Cluster::Alone;
                    self.try_all(now)
                }
                Known::Ask(writers, question) => {
                    self.state = State::Writers(request, writers);
                    Step::Query(question)
                }
                Known::Failed(failure) => Step::failed(failure),
            },

            (State::Sleep(None), _) => self.try_all(now),
            (State::Sleep(Some(millis)), _) => self.wait(millis, now),
        }
    }

    fn abandon(&self) -> Abandoned {
        let request = match &self.state {
            _ if !self.droppable => return Abandoned::broken(),
            State::Sleep(_) => return Abandoned::default(),
            State::Ask(request)
            | State::KeepErrno(request, _)
            | State::Writers(request, _)
            | State::GiveBack { request, .. } => request,
        };
        let waits = matches!(self.state, State::Ask(_)) && request.waits;
        let reclaim = slot_sql::reclaim_unread(request.tag);
        Abandoned {
            messages: match (waits, self.cancellable) {
                (false, _) => vec![reclaim.into()],
                (true, true) => Abandoned::twice(reclaim),
                // See `Acquire`: the wait must end when the connection is closed.
                (true, false) => Vec::new(),
            },
            broken: true,
            cancel: waits,
            ..Abandoned::default()
        }
    }
}
