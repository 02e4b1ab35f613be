use crate::flavor::Error;

/// The error of an application.
#[derive(Debug)]
pub(crate) enum AppError {
    /// One of its own.
    Own,
    /// The lock's, or the database's.
    Lock(Error),
}

impl From<Error> for AppError {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<diesel::result::Error> for AppError {
    fn from(error: diesel::result::Error) -> Self {
        Self::Lock(error.into())
    }
}

/// Panics, without a message on standard error.
pub(crate) fn panic_quietly() -> ! {
    std::panic::resume_unwind(Box::new("as asked"))
}
