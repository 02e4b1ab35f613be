use std::time::Duration;

use crate::LockKey;
use crate::mysql::sql::{self, List};
use crate::mysql::tag::Tag;
use crate::proto::{
    Abandoned, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows, Step,
};

/// Releases several named locks.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Release` | releases all | all | released |
/// | | | the place of one | that one was not held; the others are released |
/// | | | one was not held, without a row | `Which` |
/// | `Which` | the place of the one that was not held | a place | that one was not held |
/// | | | anything else | one was not held |
/// | each | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(in crate::mysql) struct ReleaseAll {
    list: List,
    names: Vec<Option<Box<LockKey>>>,
    droppable: bool,
    tag: Tag,
    state: State,
}

#[derive(Debug)]
enum State {
    Release,
    Which(Tag),
}

impl ReleaseAll {
    pub(in crate::mysql) fn new(holds: Vec<Hold<String>>) -> Self {
        Self {
            list: List::of(holds.iter()),
            droppable: holds.iter().any(|hold| hold.droppable),
            names: holds.into_iter().map(|hold| hold.name).collect(),
            tag: Tag::new(),
            state: State::Release,
        }
    }

    fn not_held(&mut self, place: Option<i64>) -> Step<()> {
        let index = place.and_then(|place| usize::try_from(place - 1).ok());
        let name = index.and_then(|index| self.names.get_mut(index));
        Step::failed(Failure {
            key: name.and_then(Option::take),
            ..Failure::not_held(Cause::default())
        })
    }
}

impl Machine for ReleaseAll {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(sql::release_all(self.tag, &self.list, self.droppable))
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        let places = self.names.len();
        match (std::mem::replace(&mut self.state, State::Release), answer) {
            (
                State::Release,
                Answer::Error(ErrorFields {
                    lost: true, cause, ..
                }),
            ) => Step::failed(Failure::lost(cause)),
            (State::Release, Answer::Rows(Rows::Number(number))) if self.droppable => {
                match self.tag.remove_place(number, places) {
                    Ok(0) => Step::Done(Ok(())),
                    Ok(place) => self.not_held(Some(place)),
                    Err(out_of_step) => Step::failed(out_of_step),
                }
            }
            (State::Release, Answer::Rows(Rows::Number(Some(0)))) => Step::Done(Ok(())),
            (State::Release, Answer::Rows(Rows::Number(Some(1)))) => {
                let tag = Tag::new();
                self.state = State::Which(tag);
                Step::Query(sql::lost(tag))
            }
            (State::Release, Answer::Error(error)) => {
                Step::failed(Reason::Database.broken(error.cause))
            }
            (State::Release, _) => Step::failed(Reason::Database.broken(Cause::default())),

            (State::Which(tag), Answer::Rows(Rows::Number(number))) => {
                let place = tag.remove_place(number, places);
                self.not_held(place.ok())
            }
            (State::Which(_), _) => self.not_held(None),
        }
    }

    /// Which were released nobody knows, and to release one once more could take an outer guard's hold.
    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
