//! Tests that are written once, for async connections, and compiled for sync ones as well.
//!
//! It works on tokens, and so in closures and within `assert!` and other macros, too. The crate bisync, which did the same,
//! has been withdrawn, and maybe-async looks into neither.

use proc_macro::{Group, Ident, TokenStream, TokenTree};

/// The item as it stands.
#[proc_macro_attribute]
pub fn with_await(_: TokenStream, item: TokenStream) -> TokenStream {
    item
}

/// The item without `async` and `.await`, and with `Fn` for `AsyncFn`.
#[proc_macro_attribute]
pub fn without_await(_: TokenStream, item: TokenStream) -> TokenStream {
    strip(item)
}

fn strip(tokens: TokenStream) -> TokenStream {
    let mut stripped: Vec<TokenTree> = Vec::new();
    for token in tokens {
        match token {
            TokenTree::Group(group) => {
                let mut inner = Group::new(group.delimiter(), strip(group.stream()));
                inner.set_span(group.span());
                stripped.push(inner.into());
            }
            TokenTree::Ident(ident) => match ident.to_string().as_str() {
                "async" => {}
                // With the dot before it.
                "await" => drop(stripped.pop()),
                name => match name.strip_prefix("AsyncFn") {
                    Some(rest) => {
                        stripped.push(Ident::new(&format!("Fn{rest}"), ident.span()).into());
                    }
                    None => stripped.push(ident.into()),
                },
            },
            other => stripped.push(other),
        }
    }
    stripped.into_iter().collect()
}
