use std::env;
use std::str::FromStr;

/// The number that an environment variable asks for, if it is set.
///
/// # Panics
///
/// If it is set to something else.
#[track_caller]
pub fn number_from_environment<N: FromStr>(variable: &str) -> Option<N> {
    let value = env::var(variable).ok()?;
    let number = value.parse().ok();
    Some(number.unwrap_or_else(|| panic!("{variable} is {value:?}, which is no such number")))
}
