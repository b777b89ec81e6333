const items=[...document.querySelectorAll('[data-dataset]')],kinds=[['dataset','data set'],['preset','preset'],['experiment','experiment'],['defence','defence']];
const parts=(item,kind)=>(item.dataset[kind]||'').split('|').filter(Boolean),fields={};
const bar=document.createElement('form');bar.className='filters';bar.setAttribute('role','search');bar.onsubmit=event=>event.preventDefault();
const add=(name,field)=>{const label=document.createElement('label');label.append(name,field);bar.append(label);field.oninput=show;return field};
const words=add('words',Object.assign(document.createElement('input'),{type:'search',placeholder:'any text'}));
for(const [kind,name] of kinds){
  const select=document.createElement('select'),values=[...new Set(items.flatMap(item=>parts(item,kind)))].sort((a,b)=>a.localeCompare(b));
  for(const value of ['',...values])select.append(new Option(value||'all',value));
  fields[kind]=add(name,select)}
function show(){
  const asked=words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for(const item of items){const text=item.textContent.toLowerCase();
    item.hidden=!asked.every(word=>text.includes(word))||kinds.some(([kind])=>fields[kind].value&&!parts(item,kind).includes(fields[kind].value))}
  for(const place of document.querySelectorAll('[data-count]')){const mine=items.filter(item=>item.matches(place.dataset.count));
    place.textContent=mine.filter(item=>!item.hidden).length+' of '+mine.length}}
document.querySelector('h2').before(bar);show();
