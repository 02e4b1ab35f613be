use std::time::Duration;

use super::errno::Fault;
use super::sql::{self, Cluster, Limit};
use super::tag::Tag;
use super::writers::{Known, Writers};
use crate::Mode;
use crate::proto::{
    Abandoned, AfterBusy, Answer, Ask, Cause, Depth, ErrorFields, Failure, Hold, Machine, Reason,
    Rows, Step, Wait, Waiting,
};

/// Acquires a named lock.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | one statement that tries, and waits where it must | granted | granted |
/// | | | taken | `Ask` for what is left of the limit, `Sleep`, or gives up |
/// | | | taken, too early and without a row | `Early` |
/// | | | killed | fails, nothing is held |
/// | | | an error | `KeepErrno` |
/// | | | anything else | `Examine` |
/// | `Early` | was it killed? | taken, killed | see above |
/// | | | anything else | fails, nothing is held |
/// | `KeepErrno` | keeps the error's number | any | `Examine` |
/// | `Examine` | which error was it, and is there a lock? | no lock, the limit passed | as taken |
/// | | | no lock, and the server knows nothing of clusters | `Ask`, without that question |
/// | | | no lock, and the name is refused | `Writers` |
/// | | | no lock | fails, nothing is held |
/// | | | a lock, the limit passed | granted: the grant came first, by a hair |
/// | | | a lock, and the name is refused, or the number was not kept | fails, the session is ended |
/// | | | a lock | `GiveBack` |
/// | | | an error, as to `KeepErrno` | `Silent` |
/// | | | anything else | fails, the session is ended |
/// | `Silent` | is the session there? | done | fails: the engine has no such locks; the session is ended |
/// | | | an error | fails: the session is gone |
/// | `Writers` | is it one of several servers that take writes? | yes | fails, nothing is held |
/// | | | no | `Ask` |
/// | | | an error | `Writers`, once; then fails, nothing is held |
/// | `GiveBack` | releases it | 1 | fails, nothing is held |
/// | | | anything else | fails, the session is ended |
/// | `Sleep` | | | `Ask` |
/// | each | | the answer to an earlier question | fails, the session is ended |
/// | each | | an error: the session is gone | fails, nothing is held |
#[derive(Debug)]
pub(super) struct Acquire {
    key: String,
    pub(super) wait: Wait,
    depth: Depth,
    droppable: bool,
    cancellable: bool,
    cluster: Cluster,
    waiting: Waiting,
    state: State,
}

/// The lock was asked for.
#[derive(Clone, Copy, Debug)]
struct Request {
    tag: Tag,
    limit: Limit,
    sent: Duration,
}

impl Request {
    /// Whether the wait cannot be over.
    fn is_early(&self, now: Duration) -> bool {
        now.saturating_sub(self.sent) < self.limit.shortest_wait()
    }
}

#[derive(Debug)]
enum State {
    Ask(Request),
    Early(Request, Tag),
    KeepErrno(Request, Cause),
    Examine(Request, Fault, Tag),
    GiveBack(Request, Reason, Cause, Tag),
    /// Nothing about the request was answered.
    Silent(Request, Cause),
    Writers(Request, Writers),
    Sleep,
}

type Acquired = Step<Option<Hold<String>>>;

impl Acquire {
    pub(super) fn new(key: String, ask: &Ask, depth: Depth) -> Self {
        Self {
            key,
            wait: ask.wait,
            depth,
            droppable: ask.droppable,
            cancellable: ask.cancellable,
            cluster: Cluster::Checked,
            waiting: ask.wait.since(Duration::ZERO),
            state: State::Sleep,
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Asks and waits for what is left of the limit.
    fn ask(&mut self, now: Duration) -> Acquired {
        let limit = match self.waiting.first(now) {
            None => Limit::Forever,
            Some(0) => Limit::Try,
            Some(millis) => Limit::Millis(millis),
        };
        let tag = Tag::new();
        self.state = State::Ask(Request {
            tag,
            limit,
            sent: now,
        });
        Step::Query(sql::acquire(
            tag,
            &self.key,
            limit,
            self.droppable,
            self.cluster,
        ))
    }

    /// Whether the statement that took the lock can release it: it also asks whether this is a cluster.
    fn releases_by_the_same(&self) -> bool {
        self.droppable && self.cluster.is_in_the_text()
    }

    fn granted(&self) -> Acquired {
        let droppable = self.releases_by_the_same();
        let hold = Hold::new(self.key.clone(), Mode::Exclusive, self.depth, droppable);
        Step::Done(Ok(Some(hold)))
    }

    fn taken(&mut self, request: Request, now: Duration) -> Acquired {
        match self.waiting.after_busy(now) {
            AfterBusy::GiveUp => Step::Done(Ok(None)),
            AfterBusy::Sleep(interval) => self.sleep(interval),
            // A server that does not wait is not asked again without a pause.
            AfterBusy::Queue(_) if request.is_early(now) => self.sleep(Wait::PAUSE),
            AfterBusy::Queue(_) => self.ask(now),
        }
    }

    fn sleep(&mut self, interval: Duration) -> Acquired {
        self.state = State::Sleep;
        Step::Sleep(interval)
    }

    fn examine(&mut self, request: Request, fault: Fault) -> Acquired {
        let tag = Tag::new();
        self.state = State::Examine(request, fault, tag);
        Step::Query(sql::examine(tag, request.tag, &self.key))
    }

    /// `fault` is `None` if the limit passed.
    fn examined(
        &mut self,
        request: Request,
        fault: Option<(Reason, Cause)>,
        granted: bool,
        now: Duration,
    ) -> Acquired {
        match fault {
            None if granted => self.granted(),
            None => self.taken(request, now),
            Some((Reason::UnknownVariable, _)) if !granted && self.cluster == Cluster::Checked => {
                self.cluster = Cluster::Unchecked;
                self.ask(now)
            }
            Some((Reason::WrongName, cause)) if !granted && self.cluster == Cluster::Checked => {
                let (writers, question) = Writers::ask(cause);
                self.state = State::Writers(request, writers);
                Step::Query(question)
            }
            // It failed before it asked for the lock, which an outer guard holds. Or so said an older error.
            Some((reason @ (Reason::WrongName | Reason::Cluster), cause)) if granted => {
                unknown(reason, cause)
            }
            Some((reason, cause)) if granted => {
                let tag = Tag::new();
                self.state = State::GiveBack(request, reason, cause, tag);
                let droppable = self.releases_by_the_same();
                Step::Query(sql::release(tag, &self.key, droppable))
            }
            Some((reason, cause)) => Step::failed(reason.clean(cause)),
        }
    }
}

/// Nobody knows whether the session holds the lock.
fn unknown(reason: Reason, cause: Cause) -> Acquired {
    Step::failed(reason.broken(cause))
}

impl Machine for Acquire {
    type Output = Option<Hold<String>>;

    fn start(&mut self, now: Duration) -> Acquired {
        self.waiting = self.wait.since(now);
        self.ask(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired {
        use Answer::{Done, Error, Rows as Row};

        const KILLED: fn() -> Acquired =
            || Step::failed(Reason::Interrupted.clean(Cause::default()));
        match (std::mem::replace(&mut self.state, State::Sleep), answer) {
            (
                _,
                Error(ErrorFields {
                    lost: true, cause, ..
                }),
            ) => Step::failed(Failure::lost(cause)),

            (State::Ask(request), Row(Rows::Number(number))) => {
                match sql::read(number, request.tag, self.droppable) {
                    Ok(sql::GRANTED) => self.granted(),
                    Ok(sql::TAKEN) if !self.droppable && request.is_early(now) => {
                        let tag = Tag::new();
                        self.state = State::Early(request, tag);
                        Step::Query(sql::unanswered(tag))
                    }
                    Ok(sql::TAKEN) => self.taken(request, now),
                    Ok(sql::KILLED) => KILLED(),
                    Ok(_) => self.examine(request, Fault::Strange),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::Ask(request), Error(error)) => {
                self.state = State::KeepErrno(request, error.cause);
                Step::Batch(sql::KEEP_ERRNO.into())
            }
            (State::Ask(request), _) => self.examine(request, Fault::Strange),

            (State::Early(request, tag), Row(Rows::Number(number))) => match tag.remove(number) {
                Ok(sql::TAKEN) => self.taken(request, now),
                Ok(sql::KILLED) => KILLED(),
                Ok(_) => Step::failed(Reason::Database.clean(Cause::default())),
                Err(out_of_step) => Step::failed(out_of_step),
            },
            (State::Early(..), Error(error)) => Step::failed(Reason::Database.clean(error.cause)),
            (State::Early(..), _) => Step::failed(Reason::Database.clean(Cause::default())),

            (State::KeepErrno(request, cause), Done) => self.examine(request, Fault::Kept(cause)),
            (State::KeepErrno(request, cause), _) => self.examine(request, Fault::Silent(cause)),

            (State::Examine(request, fault, tag), Row(Rows::Pair(errno, number))) => {
                // If it does not tell, the name may have been refused, and the lock be an outer guard's.
                let told = fault.tells(errno);
                let fault = fault.read(errno, request.limit);
                match tag.remove(number) {
                    Ok(granted @ (0 | 1)) if granted == 0 || told => {
                        self.examined(request, fault, granted == 1, now)
                    }
                    Ok(_) => {
                        let (reason, cause) = fault.unwrap_or((Reason::Database, Cause::default()));
                        unknown(reason, cause)
                    }
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::Examine(_, Fault::Strange, _), _) => {
                unknown(Reason::Database, Cause::default())
            }
            (State::Examine(request, Fault::Silent(cause), _), Error(_)) => {
                self.state = State::Silent(request, cause);
                Step::Batch(sql::ARE_YOU_THERE.into())
            }
            (State::Silent(_, cause), Done) => unknown(Reason::Unsupported, cause),
            // Ended for the case that it is there and was killed each time.
            (State::Silent(_, cause), _) => unknown(Reason::Lost, cause),
            (State::Examine(_, Fault::Kept(cause) | Fault::Silent(cause), _), _) => {
                unknown(Reason::Database, cause)
            }

            (State::GiveBack(_, reason, cause, tag), Row(Rows::Number(number))) => {
                match sql::read(number, tag, self.releases_by_the_same()) {
                    Ok(1) => Step::failed(reason.clean(cause)),
                    Ok(_) => unknown(reason, cause),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::GiveBack(_, reason, cause, _), _) => unknown(reason, cause),

            (State::Writers(request, writers), answer) => match writers.next(answer) {
                Known::Alone => {
                    self.cluster = Cluster::Alone;
                    self.ask(now)
                }
                Known::Ask(writers, question) => {
                    self.state = State::Writers(request, writers);
                    Step::Query(question)
                }
                Known::Failed(failure) => Step::failed(failure),
            },

            (State::Sleep, _) => self.ask(now),
        }
    }

    fn abandon(&self) -> Abandoned {
        let request = match &self.state {
            _ if !self.droppable => return Abandoned::broken(),
            State::Sleep => return Abandoned::default(),
            State::Ask(request)
            | State::Early(request, _)
            | State::KeepErrno(request, _)
            | State::Examine(request, ..)
            | State::Silent(request, _)
            | State::Writers(request, _)
            | State::GiveBack(request, ..) => request,
        };
        let waits = matches!(self.state, State::Ask(_)) && request.limit != Limit::Try;
        let reclaim = sql::reclaim_unread(request.tag, &self.key);
        Abandoned {
            messages: match (waits, self.cancellable) {
                (false, _) => vec![reclaim.into()],
                (true, true) => Abandoned::twice(reclaim),
                // If nobody cancels the wait, it must end when the connection is closed. The server does not notice
                // that while there is a message to read. (MySQL 9.7, MariaDB 11.8; otherwise they look each second.)
                (true, false) => Vec::new(),
            },
            broken: true,
            cancel: waits,
            ..Abandoned::default()
        }
    }
}
