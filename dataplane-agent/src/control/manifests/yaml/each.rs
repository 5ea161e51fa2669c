//! Reads a document of long lists element by element: the tree of the whole would take many times the memory of
//! the result.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{AnyValue, Node, NodeError, Value, Wrapped, scalars};

/// A collection that the elements of a list are added to.
pub(crate) trait Collect: Default {
    /// The type of an element in the file.
    type Element: DeserializeOwned;

    /// Adds an element.
    fn add(&mut self, element: Self::Element);
}

impl<T: DeserializeOwned> Collect for Vec<T> {
    type Element = T;

    fn add(&mut self, element: T) {
        self.push(element);
    }
}

/// A list whose elements are read one by one, with [`Node::read_lenient`]; or the first error in it.
pub(crate) struct Each<C>(pub(crate) Result<C, NodeError>);

/// The fields of a map that are long lists.
pub(crate) trait Lists: Default {
    /// All fields that the map may have.
    type Names: DeserializeOwned;

    /// Takes the value of a field if it is one of these lists; returns `false` otherwise.
    fn take<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<bool, A::Error>;
}

/// A map of long lists.
pub(crate) struct Document<L> {
    lists: L,
    /// The map without the lists.
    rest: Node,
}

impl<L: Lists> Document<L> {
    /// Returns the line at which it begins; 0 if unknown.
    pub(crate) fn line(&self) -> u64 {
        self.rest.line
    }

    /// Returns the lists, if the map has no unknown fields.
    pub(crate) fn lists(self) -> Result<L, NodeError> {
        self.rest.read_lenient::<L::Names>()?;
        Ok(self.lists)
    }
}

impl<C: Default> Default for Each<C> {
    fn default() -> Self {
        Self(Ok(C::default()))
    }
}

impl<'de, C: Collect> Deserialize<'de> for Each<C> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (line, tag, found) = Wrapped::<Found<C>>::deserialize(deserializer)?.parts();
        let (elements, value) = match found {
            Found::List(elements) => (elements, Value::List(Vec::new())),
            Found::Other(Value::Null) => return Ok(Self::default()),
            Found::Other(value) => (Ok(C::default()), value),
        };
        let rest = Node { line, tag, value };
        let is_list = rest.read_lenient::<Vec<IgnoredAny>>();
        Ok(Self(is_list.and(elements)))
    }
}

impl<'de, L: Lists> Deserialize<'de> for Document<L> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (line, tag, fields) = Wrapped::<Fields<L>>::deserialize(deserializer)?.parts();
        let Fields { lists, rest: value } = fields;
        let rest = Node { line, tag, value };
        Ok(Self { lists, rest })
    }
}

/// The value found in the place of a list.
enum Found<C> {
    List(Result<C, NodeError>),
    Other(Value),
}

impl<C> From<Value> for Found<C> {
    fn from(value: Value) -> Self {
        Self::Other(value)
    }
}

impl<'de, C: Collect> Deserialize<'de> for Found<C> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<C>(PhantomData<C>);
        impl<'de, C: Collect> Visitor<'de> for Elements<C> {
            type Value = Found<C>;
            scalars!();
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Found<C>, A::Error> {
                let mut found = Ok(C::default());
                let mut at = 0;
                // Go on after a wrong element, since errors of YAML syntax take precedence.
                while let Some(node) = seq.next_element::<Node>()? {
                    if let Ok(made) = &mut found {
                        match node.read_lenient() {
                            Ok(element) => made.add(element),
                            Err(error) => found = Err(error.below(&format!("[{at}]"))),
                        }
                    }
                    at += 1;
                }
                Ok(Found::List(found))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Found<C>, A::Error> {
                AnyValue.visit_map(map).map(Found::Other)
            }
        }
        deserializer.deserialize_any(Elements(PhantomData))
    }
}

struct Fields<L> {
    lists: L,
    rest: Value,
}

impl<L: Default> From<Value> for Fields<L> {
    fn from(rest: Value) -> Self {
        let lists = L::default();
        Self { lists, rest }
    }
}

impl<'de, L: Lists> Deserialize<'de> for Fields<L> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map<L>(PhantomData<L>);
        impl<'de, L: Lists> Visitor<'de> for Map<L> {
            type Value = Fields<L>;
            scalars!();
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Fields<L>, A::Error> {
                AnyValue.visit_seq(seq).map(Into::into)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<L>, A::Error> {
                let (mut lists, mut rest) = (L::default(), Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !lists.take(&name, &mut map)? {
                        rest.push((name, map.next_value()?));
                    }
                }
                let rest = Value::Map(rest);
                Ok(Fields { lists, rest })
            }
        }
        deserializer.deserialize_any(Map(PhantomData))
    }
}
