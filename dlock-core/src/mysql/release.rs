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
/// | | an error | asks whether the session is there |
/// | | anything else | fails, the session is ended |
/// | is the session there? | an error | fails, nothing is held |
/// | | anything else | fails, the session is ended |
#[derive(Debug)]
pub(super) struct Release {
    hold: Hold<String>,
    tag: Tag,
    /// The release has failed.
    failed: Option<Cause>,
}

impl Release {
    pub(super) fn new(hold: Hold<String>) -> Self {
        Self {
            hold,
            tag: Tag::new(),
            failed: None,
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
        if let Some(cause) = self.failed.take() {
            return Step::failed(match answer {
                // Ended for the case that it is there and was killed each time.
                Answer::Error(_) => Reason::Lost.broken(cause),
                _ => Reason::Database.broken(cause),
            });
        }
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
            Answer::Error(error) => {
                self.failed = Some(error.cause);
                return Step::Batch(sql::ARE_YOU_THERE.into());
            }
            _ => Err(Reason::Database.broken(Cause::default())),
        })
    }

    /// Whether it was released nobody knows, and to release it once more could take an outer guard's hold.
    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}
