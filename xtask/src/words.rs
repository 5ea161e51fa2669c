//! The words that leave the agent, collected from its source: fields of the log, names of values in log, metrics
//! and reports, fields of JSON, exit codes. Dashboards and scripts depend on them, so each is in
//! `tests/golden/words.txt`, and a new one is a decision.
//!
//! Names and labels of metrics are in `metrics.txt` beside it, and the output of `--help` in `help.txt`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A kind of word, `log field`, `log target`, `word`, `json` or `exit code`, and the word.
pub(crate) type Word = (&'static str, String);

/// Macros of `tracing` that write a line.
const LOG_MACROS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "event"];
/// Functions that return the word for a value.
const NAMERS: [&str; 4] = ["word", "reason", "direction", "what"];
/// Files whose strings are field names of JSON.
const JSON_FILES: [&str; 1] = ["dump.rs"];

/// Returns the words in a file.
///
/// # Errors
/// The file is not valid Rust.
pub(crate) fn of(path: &Path, text: &str) -> Result<BTreeSet<Word>> {
    let tokens: TokenStream = text
        .parse()
        .map_err(|error| anyhow!("{}: {error}", path.display()))?;
    let mut words = BTreeSet::new();
    let is = |name: &str| path.file_name().is_some_and(|file| file == name);
    walk(tokens, JSON_FILES.into_iter().any(is), &mut words);
    Ok(words)
}

/// Returns the words of the golden file, without its comments.
///
/// # Errors
/// A line has no kind.
pub(crate) fn golden(text: &str) -> Result<BTreeSet<(&str, &str)>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let word = |line| str::split_once(line, ": ").with_context(|| format!("`{line}` has no kind"));
    lines.map(word).collect()
}

fn walk(tokens: TokenStream, json: bool, words: &mut BTreeSet<Word>) {
    let all: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < all.len() {
        let rest = &all[at..];
        if is_test(rest) {
            at += item(rest);
            continue;
        }
        if let [
            _,
            _,
            _,
            TokenTree::Ident(name),
            bang,
            TokenTree::Group(group),
            ..,
        ] = rest
            && begins(rest, &["tracing", ":", ":"])
            && LOG_MACROS.into_iter().any(|line| name == line)
            && is(bang, "!")
        {
            fields(group.stream(), words);
        }
        if let [_, TokenTree::Ident(name), ..] = rest
            && is(&rest[0], "fn")
            && NAMERS.into_iter().any(|namer| name == namer)
            && let Some(body) = braces(rest)
        {
            strings(body, &mut |word| words.insert(("word", word)));
        }
        if begins(rest, &["#"])
            && let Some(TokenTree::Group(attribute)) = rest.get(1)
            && is_serialized(&attribute.stream())
            && rest[..item(rest)].iter().any(|token| is(token, "struct"))
            && let Some(body) = braces(rest)
        {
            members(body, words);
        }
        if begins(rest, &["enum", "Exit"])
            && let Some(body) = braces(rest)
        {
            codes(body, words);
        }
        match &all[at] {
            TokenTree::Group(group) => walk(group.stream(), json, words),
            TokenTree::Literal(literal) if json => {
                let word = string(&literal.to_string());
                words.extend(word.filter(|word| is_name(word)).map(|word| ("json", word)));
            }
            _ => {}
        }
        at += 1;
    }
}

/// Collects the fields of a log line from the macro's arguments: `name = value`, or a value that is also the name.
fn fields(tokens: TokenStream, words: &mut BTreeSet<Word>) {
    let all: Vec<TokenTree> = tokens.into_iter().collect();
    for argument in all.split(|token| is(token, ",")) {
        if let [TokenTree::Literal(_), ..] = argument {
            return; // the message, and what is put into it
        }
        if begins(argument, &["target", ":"]) {
            let target = argument.get(2).and_then(|value| string(&value.to_string()));
            words.extend(target.map(|target| ("log target", target)));
            continue;
        }
        let named = argument.iter().position(|token| is(token, "="));
        let bare = argument.iter().position(|token| !is_sigil(token));
        let name = match (named, bare) {
            (Some(end), _) => &argument[..end],
            (None, Some(begin)) => &argument[begin..],
            (None, None) => continue,
        };
        let is_dotted = |token: &TokenTree| matches!(token, TokenTree::Ident(_)) || is(token, ".");
        if name.iter().all(is_dotted) && !name.is_empty() {
            let name: String = name.iter().map(ToString::to_string).collect();
            words.insert(("log field", name));
        }
    }
}

fn is_sigil(token: &TokenTree) -> bool {
    is(token, "%") || is(token, "?")
}

/// Collects the members of a structure that is written as JSON.
fn members(tokens: TokenStream, words: &mut BTreeSet<Word>) {
    let all: Vec<TokenTree> = tokens.into_iter().collect();
    let mut angles = 0;
    for (at, token) in all.iter().enumerate() {
        match token.to_string().as_str() {
            "<" => angles += 1,
            ">" => angles -= 1,
            _ => {}
        }
        let ends = |token: Option<&TokenTree>| token.is_some_and(|token| is(token, ":"));
        let is_path = ends(all.get(at + 2)) || at > 0 && ends(all.get(at - 1));
        if matches!(token, TokenTree::Ident(_)) && angles == 0 && ends(all.get(at + 1)) && !is_path
        {
            words.insert(("json", token.to_string()));
        }
    }
}

/// Collects the exit codes with their names.
fn codes(tokens: TokenStream, words: &mut BTreeSet<Word>) {
    let all: Vec<TokenTree> = tokens.into_iter().collect();
    for window in all.windows(3) {
        if is(&window[1], "=") {
            words.insert(("exit code", format!("{} {}", window[2], window[0])));
        }
    }
}

/// Passes every string to `found`.
fn strings(tokens: TokenStream, found: &mut impl FnMut(String) -> bool) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => strings(group.stream(), found),
            TokenTree::Literal(literal) => {
                string(&literal.to_string()).map(&mut *found);
            }
            _ => {}
        }
    }
}

/// Returns the value of a string literal.
fn string(literal: &str) -> Option<String> {
    let inner = literal.strip_prefix('"')?.strip_suffix('"')?;
    Some(inner.to_owned())
}

/// Returns `true` if a string may be the name of a field.
fn is_name(word: &str) -> bool {
    word.chars().all(|one| one.is_ascii_alphanumeric()) && !word.is_empty()
}

fn is(token: &TokenTree, text: &str) -> bool {
    match token {
        TokenTree::Ident(ident) => ident == text,
        TokenTree::Punct(punct) => text.len() == 1 && text.starts_with(punct.as_char()),
        TokenTree::Group(_) | TokenTree::Literal(_) => false,
    }
}

fn begins(tokens: &[TokenTree], with: &[&str]) -> bool {
    tokens.len() >= with.len() && tokens.iter().zip(with).all(|(token, text)| is(token, text))
}

/// Returns the contents of the first braces.
fn braces(tokens: &[TokenTree]) -> Option<TokenStream> {
    tokens.iter().find_map(|token| match token {
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => Some(group.stream()),
        _ => None,
    })
}

/// Returns the number of tokens of an item with its attributes: to its braces, or its semicolon.
fn item(tokens: &[TokenTree]) -> usize {
    let ends = |token: &TokenTree| {
        let braced =
            matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
        braced || is(token, ";")
    };
    let end = tokens.iter().position(ends);
    end.map_or(tokens.len(), |end| end + 1)
}

/// Returns `true` if an item begins here that is only for tests.
fn is_test(tokens: &[TokenTree]) -> bool {
    let [hash, TokenTree::Group(attribute), ..] = tokens else {
        return false;
    };
    is(hash, "#") && attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

fn is_serialized(attribute: &TokenStream) -> bool {
    let mut idents = attribute.clone().into_iter();
    idents.next().is_some_and(|first| is(&first, "derive"))
        && attribute.to_string().contains("Serialize")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        let words = of(Path::new("observe/x.rs"), text).expect("Rust");
        let shown = words
            .into_iter()
            .map(|(kind, word)| format!("{kind}: {word}"));
        shown.collect()
    }

    #[test]
    fn fields_of_the_log_are_found_in_all_their_forms() {
        let text = r#"fn f() {
            tracing::warn!(target: "access", src.addr = %line.src, pods, %error, ?found, "it {x} = y {}", more.so);
            macro_rules! tell { ($level:expr) => { tracing::event!($level, reason, times = (a = b)) } }
            info!(not_ours = 1);
        }"#;
        assert_eq!(
            words(text),
            [
                "log field: error",
                "log field: found",
                "log field: pods",
                "log field: reason",
                "log field: src.addr",
                "log field: times",
                "log target: access",
            ]
        );
    }

    #[test]
    fn words_members_and_codes_are_found_but_not_those_of_tests() {
        let text = r#"
            impl A { fn reason(&self) -> &'static str { match self { Self::B(_) => "b", _ => "c" } } }
            #[derive(Clone, Serialize)] pub struct R { pub node: a::B<C>, #[serde(default)] machine: String }
            #[derive(Clone)] struct Own { never: u8 }
            pub enum Exit { Good = 0, Failed = 1 }
            #[cfg(test)] mod tests { fn word() -> &'static str { "never" } }
        "#;
        assert_eq!(
            words(text),
            [
                "exit code: 0 Good",
                "exit code: 1 Failed",
                "json: machine",
                "json: node",
                "word: b",
                "word: c",
            ]
        );
    }

    #[test]
    fn what_is_written_by_hand_needs_a_kind() {
        let all = golden("# about\nword: up\njson: node\n").expect("two words");
        assert_eq!(all, BTreeSet::from([("word", "up"), ("json", "node")]));
        assert!(golden("up\n").is_err());
    }
}
