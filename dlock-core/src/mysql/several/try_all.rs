use std::time::Duration;

use crate::mysql::errno::reason;
use crate::mysql::sql::{self, Cluster, Limit, List};
use crate::mysql::tag::Tag;
use crate::mysql::writers::{Known, Writers};
use crate::proto::{
    Abandoned, Answer, Cause, ErrorFields, Failure, Machine, Reason, Rows, Step, Tried, TriedEnd,
};

/// Takes named locks in their order, up to the first that is taken by others, without waiting.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Ask` | takes them | all | all are held |
/// | | | -, the place of the one that is taken | those before it are held |
/// | | | one is taken, without a row | `Count` |
/// | | | an error | `KeepErrno` |
/// | `Count` | how many are held? | a number | those are held |
/// | `KeepErrno` | keeps the error's number | any | `Examine` |
/// | `Examine` | which error was it, and how many are held? | a number | those are held, and it fails |
/// | | | none, and the server knows nothing of clusters | `Ask`, without that question |
/// | | | none, and the name is refused | `Writers` |
/// | | | an error, as to `KeepErrno` | `Silent` |
/// | `Writers` | is it one of several servers that take writes? | yes | fails, nothing is held |
/// | | | no | `Ask` |
/// | | | an error | `Writers`, once; then fails, nothing is held |
/// | `Silent` | is the session there? | done | fails: the engine has no such locks; the session is ended |
/// | | | an error | fails: the session is gone |
/// | each | | the answer to an earlier question | fails, the session is ended |
/// | each | | an error: the session is gone | fails, nothing is held |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(in crate::mysql) struct TryAll {
    list: List,
    count: usize,
    droppable: bool,
    cluster: Cluster,
    request: Tag,
    state: State,
}

#[derive(Debug)]
enum State {
    Ask,
    Count(Tag),
    KeepErrno(Cause),
    Examine {
        cause: Cause,
        kept: bool,
        tag: Tag,
    },
    /// Nothing about the request was answered.
    Silent(Cause),
    Writers(Writers),
}

impl TryAll {
    pub(super) fn new(list: List, count: usize, droppable: bool) -> Self {
        Self {
            list,
            count,
            droppable,
            cluster: Cluster::Checked,
            request: Tag::new(),
            state: State::Ask,
        }
    }

    /// Whether they are to be released by the statement that has taken them, which asks whether it is a cluster.
    pub(super) fn droppable(&self) -> bool {
        self.droppable && self.cluster.is_in_the_text()
    }

    fn ask(&mut self) -> Step<Tried> {
        self.state = State::Ask;
        Step::Query(sql::take_all(
            self.request,
            &self.list,
            self.droppable,
            self.cluster,
        ))
    }

    /// So many are held, and the next one is taken.
    fn held(&self, held: i64) -> Step<Tried> {
        match usize::try_from(held) {
            Ok(held) if held < self.count => Step::Done(Ok(Tried {
                held,
                end: TriedEnd::Taken(held),
            })),
            _ => Step::failed(Reason::Database.broken(Cause::default())),
        }
    }

    fn all(&self) -> Step<Tried> {
        Step::Done(Ok(Tried {
            held: self.count,
            end: TriedEnd::All,
        }))
    }

    fn asked(&mut self, answer: Answer) -> Step<Tried> {
        match answer {
            Answer::Rows(Rows::Number(number)) if self.droppable => {
                match self.request.remove_place(number, self.count) {
                    Ok(0) => self.all(),
                    Ok(place) => self.held(place - 1),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            Answer::Rows(Rows::Number(Some(0))) => self.all(),
            Answer::Rows(Rows::Number(Some(1))) => {
                let tag = Tag::new();
                self.state = State::Count(tag);
                Step::Query(sql::got(tag))
            }
            Answer::Error(error) => {
                self.state = State::KeepErrno(error.cause);
                Step::Batch(sql::KEEP_ERRNO.into())
            }
            _ => Step::failed(Reason::Database.broken(Cause::default())),
        }
    }

    fn examined(
        &mut self,
        cause: Cause,
        kept: bool,
        errno: Option<i64>,
        held: Result<i64, Failure>,
    ) -> Step<Tried> {
        let reason = match kept {
            true => reason(errno, Limit::Try).unwrap_or(Reason::Database),
            false => Reason::Database,
        };
        match held.map(usize::try_from) {
            Ok(Ok(0)) if reason == Reason::UnknownVariable && self.cluster == Cluster::Checked => {
                self.cluster = Cluster::Unchecked;
                self.ask()
            }
            Ok(Ok(0)) if reason == Reason::WrongName && self.cluster == Cluster::Checked => {
                let (writers, question) = Writers::ask(cause);
                self.state = State::Writers(writers);
                Step::Query(question)
            }
            Ok(Ok(held)) => Step::Done(Ok(Tried {
                held,
                end: TriedEnd::Failed(reason.clean(cause)),
            })),
            Ok(Err(_)) => Step::failed(reason.broken(cause)),
            Err(out_of_step) => Step::failed(out_of_step),
        }
    }
}

impl Machine for TryAll {
    type Output = Tried;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<Tried> {
        self.ask()
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<Tried> {
        if let Answer::Error(ErrorFields {
            lost: true, cause, ..
        }) = answer
        {
            return Step::failed(Failure::lost(cause));
        }
        match (std::mem::replace(&mut self.state, State::Ask), answer) {
            (State::Ask, answer) => self.asked(answer),
            (State::Count(tag), Answer::Rows(Rows::Number(number))) => {
                match tag.remove_place(number, self.count) {
                    Ok(held) => self.held(held),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::Count(_), Answer::Error(error)) => {
                Step::failed(Reason::Database.broken(error.cause))
            }
            (State::Count(_), _) => Step::failed(Reason::Database.broken(Cause::default())),
            (State::KeepErrno(cause), answer) => {
                let tag = Tag::new();
                self.state = State::Examine {
                    cause,
                    kept: answer == Answer::Done,
                    tag,
                };
                Step::Query(sql::examine_all(tag, self.request))
            }
            (State::Examine { cause, kept, tag }, Answer::Rows(Rows::Pair(errno, number))) => {
                self.examined(cause, kept, errno, tag.remove_place(number, self.count))
            }
            (
                State::Examine {
                    cause, kept: false, ..
                },
                Answer::Error(_),
            ) => {
                self.state = State::Silent(cause);
                Step::Batch(sql::ARE_YOU_THERE.into())
            }
            (State::Writers(writers), answer) => match writers.next(answer) {
                Known::Alone => {
                    self.cluster = Cluster::Alone;
                    self.ask()
                }
                Known::Ask(writers, question) => {
                    self.state = State::Writers(writers);
                    Step::Query(question)
                }
                Known::Failed(failure) => Step::failed(failure),
            },
            (State::Silent(cause), Answer::Done) => Step::failed(Reason::Unsupported.broken(cause)),
            // Ended for the case that it is there and was killed each time.
            (State::Silent(cause), _) => Step::failed(Reason::Lost.broken(cause)),
            (State::Examine { cause, .. }, _) => Step::failed(Reason::Database.broken(cause)),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self.droppable {
            true => Abandoned {
                messages: vec![sql::reclaim_all_unread(self.request, &self.list).into()],
                ..Abandoned::broken()
            },
            false => Abandoned::broken(),
        }
    }
}
