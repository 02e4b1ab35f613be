use std::time::Duration;

use super::sql::Cluster;
use super::tag::Tag;
use super::{slot_sql, sql};
use crate::proto::{
    Abandoned, Answer, Cause, ErrorFields, Failure, Hold, Machine, Reason, Rows, Step,
};

/// Releases one hold of a named lock.
///
/// | sent | answer | then |
/// |---|---|---|
/// | the release | 1 | released |
/// | | 0 | not held: another session's, or nobody's |
/// | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(super) struct Release {
    hold: Hold<String>,
    tag: Tag,
}

impl Release {
    pub(super) fn new(hold: Hold<String>) -> Self {
        Self {
            hold,
            tag: Tag::new(),
        }
    }
}

impl Machine for Release {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Query(match self.hold.slot {
            Some(_) => {
                let cluster = match self.hold.unchecked {
                    true => Cluster::Unchecked,
                    false => Cluster::Checked,
                };
                slot_sql::release_slot(self.tag, &self.hold.key, cluster)
            }
            None => sql::release(self.tag, &self.hold.key, self.hold.droppable),
        })
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<()> {
        let has_tag = self.hold.droppable || self.hold.slot.is_some();
        Step::Done(match answer {
            Answer::Rows(Rows::Number(number) | Rows::Pair(_, number)) => {
                match sql::read(number, self.tag, has_tag) {
                    Ok(1) => Ok(()),
                    Ok(0) => Err(Failure::not_held(Cause::default())),
                    Ok(_) => Err(Reason::Database.broken(Cause::default())),
                    Err(out_of_step) => Err(out_of_step),
                }
            }
            Answer::Error(ErrorFields {
                lost: true, cause, ..
            }) => Err(Failure::lost(cause)),
            Answer::Error(error) => Err(Reason::Database.broken(error.cause)),
            _ => Err(Reason::Database.broken(Cause::default())),
        })
    }

    /// Whether it was released nobody knows, and to release it once more could take an outer guard's hold.
    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
