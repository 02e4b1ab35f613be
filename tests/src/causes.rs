use std::error::Error;
use std::iter::successors;

/// The message, and those of what caused it.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    successors(Some(error), |&error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
