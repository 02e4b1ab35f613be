//! What a public signature names, a user must be able to name through the same crate.

use std::collections::BTreeMap;

use crate::listing::{Listing, item, types};

/// Checks that each crate exports the types of other dlock crates that its signatures name. Those of what it re-exports
/// count as its own. A type that its own crate does not list is hidden there, and no user meets it.
pub(crate) fn check(listings: &[Listing]) -> bool {
    let mut passed = true;
    for listing in listings {
        for (name, line) in missing(listing, listings) {
            eprintln!(
                "{} does not export {name}, which its public API names:\n    {line}",
                listing.name
            );
            passed = false;
        }
    }
    passed
}

/// The types that a crate does not export, each with a line that names it.
fn missing<'a>(listing: &Listing, listings: &'a [Listing]) -> BTreeMap<&'a str, &'a str> {
    let exported = listing.items();
    let reexported = listing.reexports();
    let mut missing = BTreeMap::new();
    for other in listings {
        let lines = other.lines.iter().filter(|line| {
            other.name == listing.name
                || item(line, &other.name).is_some_and(|name| reexported.contains(name))
        });
        for line in lines {
            for origin in listings.iter().filter(|origin| origin.name != listing.name) {
                let listed = origin.items();
                for name in types(line, &origin.name) {
                    if listed.contains(name) && !exported.contains(name) {
                        missing.entry(name).or_insert(line.as_str());
                    }
                }
            }
        }
    }
    missing
}
