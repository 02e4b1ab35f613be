use std::time::Duration;

use crate::mysql::acquire::reason;
use crate::mysql::sql::{self, Limit, List};
use crate::mysql::tag::Tag;
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
/// | each | | the answer to an earlier question | fails, the session is ended |
/// | each | | an error: the session is gone | fails, nothing is held |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(in crate::mysql) struct TryAll {
    list: List,
    count: usize,
    droppable: bool,
    request: Tag,
    state: State,
}

#[derive(Debug)]
enum State {
    Ask,
    Count(Tag),
    KeepErrno(Cause),
    Examine { cause: Cause, kept: bool, tag: Tag },
}

impl TryAll {
    pub(super) fn new(list: List, count: usize, droppable: bool) -> Self {
        Self {
            list,
            count,
            droppable,
            request: Tag::new(),
            state: State::Ask,
        }
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
        &self,
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
        let take = sql::take_all(self.request, &self.list, self.droppable);
        Step::Query(take)
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
            // A session that does not even keep the number is gone. Drivers do not tell. Ended for the case that it is
            // there and was killed each time.
            (
                State::Examine {
                    cause, kept: false, ..
                },
                Answer::Error(_),
            ) => Step::failed(Reason::Lost.broken(cause)),
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
