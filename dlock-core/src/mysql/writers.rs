use super::sql;
use super::tag::Tag;
use crate::proto::{Answer, Cause, ErrorFields, Failure, Reason, Rows, Statement};

/// The question whether this is one of several servers that take writes, after a statement that found that it may be.
///
/// | answer | then |
/// |---|---|
/// | yes | fails |
/// | no | the lock is asked for again |
/// | an error | the question is asked once more: it may have been killed |
/// | a second one | fails: it may be one of several |
#[derive(Debug)]
pub(super) struct Writers {
    tag: Tag,
    /// Of that statement.
    cause: Cause,
    /// It has failed once.
    failed: bool,
}

/// What [`Writers`] leads to.
pub(super) enum Known {
    /// It is not: the lock is asked for again.
    Alone,
    /// The question has to be asked again.
    Ask(Writers, Statement),
    Failed(Failure),
}

impl Writers {
    pub(super) fn ask(cause: Cause) -> (Self, Statement) {
        let tag = Tag::new();
        let writers = Self {
            tag,
            cause,
            failed: false,
        };
        (writers, sql::several_writers(tag))
    }

    pub(super) fn next(self, answer: Answer) -> Known {
        match answer {
            Answer::Rows(Rows::Number(number)) => match self.tag.remove(number) {
                Ok(0) => Known::Alone,
                Ok(_) => Known::Failed(Reason::Cluster.clean(self.cause)),
                Err(out_of_step) => Known::Failed(out_of_step),
            },
            Answer::Error(ErrorFields {
                lost: true, cause, ..
            }) => Known::Failed(Failure::lost(cause)),
            _ if self.failed => Known::Failed(Reason::Cluster.clean(self.cause)),
            _ => {
                let (mut again, question) = Self::ask(self.cause);
                again.failed = true;
                Known::Ask(again, question)
            }
        }
    }
}
